//! Databases whose names change from one set to the next.

use std::fs;

use clamcast_agent::clamd::proof::GATE;
use clamcast_tests::lab::{Call, Fleet, Mirror, Part, Strace, Update, certificates_in};
use clamcast_tests::require;

use crate::host::{ALONE, Host, RUBBISH};

#[test]
fn a_database_changes_its_form_both_ways_and_also_back_from_a_refusal() {
    require!(Clamd, Freshclam, TestFiles);
    let mirror = Mirror::new();
    let fleet = Fleet::new();
    let (mut agent, mut clamd) = fleet.agent_and_clamd("web1");
    let mut master = fleet.master(&mirror.directory());
    master.configure("require = []", ALONE);
    master.start_with(&mut agent, &mut clamd);
    assert_eq!(agent.names(), ["test.cvd"]);
    mirror.freshclam_to(2);
    master.wait_live("web1", 2);
    assert_eq!(agent.names(), ["test.cld"]);

    let third = Part::TestFiles.path().join("test-3.cvd");
    let update = Update::begin(mirror.directory());
    update.put("test.cvd", fs::read(third).unwrap());
    update.remove("test.cld");
    drop(update);
    master.wait_live("web1", 3);
    assert_eq!(agent.names(), ["test.cvd"]);

    // The other form again, and a line beside it that clamd cannot read.
    let update = Update::begin(mirror.directory());
    update.put("bad.ndb", RUBBISH);
    mirror.freshclam_to(4);
    drop(update);
    let row = master.wait_agent("web1", "refused", |row| row["outcome"] == "refused");
    assert!(row["error"].as_str().unwrap().contains("alformed"), "{row}");
    assert_eq!(
        (&row["generation"], &row["live"]),
        (&3.into(), &true.into()),
        "{row}"
    );
    assert_eq!(agent.names(), ["test.cvd"]);
    fs::remove_file(mirror.directory().join("bad.ndb")).unwrap();
    master.wait_live("web1", 5);
    assert_eq!(agent.names(), ["test.cld"]);
}

#[test]
fn a_detached_signature_comes_before_its_database_and_the_old_one_goes_after_the_proof() {
    require!(Clamd, Strace, TestFiles);
    let mut host = Host::bare(Fleet::new());
    let file = |name: &str| fs::read(Part::TestFiles.path().join(name)).unwrap();
    let set = |n: u32| {
        (
            file(&format!("test-{n}.cvd")),
            file(&format!("test-{n}.cvd.sign")),
        )
    };
    let (cvd, sign) = set(1);
    let certs = host.fleet.join("certs");
    fs::create_dir(&certs).unwrap();
    fs::write(certs.join("issuer.pem"), certificates_in(&sign)).unwrap();
    let trusted = format!("quiet = \"20ms\"\ncvd_certs = {certs:?}");
    host.master.configure("quiet = \"20ms\"", &trusted);
    host.put(&[("test.cvd", &cvd), ("test-1.cvd.sign", &sign)], &[]);
    host.start();
    let database = host.agent.database();
    assert_eq!(host.agent.names(), ["test-1.cvd.sign", "test.cvd"]);

    let strace = Strace::list(host.agent.pid(), &host.fleet.join(""));
    let (cvd, sign) = set(2);
    let put: [(&str, &[u8]); 2] = [("test.cvd", &cvd), ("test-2.cvd.sign", &sign)];
    host.put(&put, &["test-1.cvd.sign"]);
    host.master.wait_live("web1", 2);
    assert_eq!(host.agent.names(), ["test-2.cvd.sign", "test.cvd"]);
    let calls = strace.calls(&[&database]);
    let directory = database.display().to_string();
    let place = |call: &str, name: &str| {
        let is = |made: &Call| {
            made.name.starts_with(call)
                && made.paths.ends_with(&[directory.clone(), name.to_owned()])
        };
        let found = calls.iter().rposition(is);
        found.unwrap_or_else(|| panic!("no {call} of {name}: {calls:?}"))
    };
    let order = [
        place("rename", "test-2.cvd.sign"),
        place("rename", "test.cvd"),
        place("rename", GATE),
        place("unlink", "test-1.cvd.sign"),
    ];
    assert!(order.is_sorted(), "{order:?} of {calls:?}");
}
