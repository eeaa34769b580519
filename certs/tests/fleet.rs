//! What the commands leave on disk, judged by those who use it: x509-parser, rustls, and the rules
//! of `clamcast-proto`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use clamcast_certs::{
    Change, Host, InitError, IssueError, Issued, Outcome, RevokeError, RotateError, Rotated,
    Rotation, State, Written, init, issue_agent, issue_master, list, revoke, rotate,
};
use clamcast_proto::dsse::{Envelope, PublicKey};
use clamcast_proto::identity::{Certificate, Role};
use clamcast_proto::keys::{KEYS_MAX, KeySet};
use clamcast_proto::names::AGENT_NAME_BYTES_MAX;
use clamcast_proto::revocation::RevocationList;
use clamcast_proto::{AgentName, GroupName};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey as _;
use jiff::{SignedDuration, Timestamp, ToSpan as _};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// A fleet in a directory that goes away with it.
struct Lab {
    scratch: tempfile::TempDir,
    now: Timestamp,
}

impl Lab {
    fn empty() -> Self {
        Self {
            scratch: tempfile::tempdir().unwrap(),
            now: "2030-01-01T00:00:00Z".parse().unwrap(),
        }
    }

    fn initialised() -> Self {
        let lab = Self::empty();
        lab.init(false).unwrap();
        lab
    }

    fn with_master() -> Self {
        let lab = Self::initialised();
        lab.master(&["mirror.example.net"], false).unwrap();
        lab
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path().join("fleet")
    }

    fn init(&self, force: bool) -> Result<clamcast_certs::Initialised, InitError> {
        init(&self.dir(), &"bank".parse().unwrap(), force, self.now)
    }

    fn master(&self, hosts: &[&str], force: bool) -> Result<Issued, IssueError> {
        let hosts: Vec<Host> = hosts.iter().map(|host| host.parse().unwrap()).collect();
        issue_master(&self.dir(), &hosts, force, self.now)
    }

    fn agent(&self, name: &str, groups: &[&str], force: bool) -> Result<Issued, IssueError> {
        let groups: Vec<GroupName> = groups.iter().map(|group| group.parse().unwrap()).collect();
        issue_agent(
            &self.dir(),
            &name.parse().unwrap(),
            &groups,
            force,
            self.now,
        )
    }

    fn revoke(&self, name: &str) -> Result<clamcast_certs::Revocation, RevokeError> {
        revoke(
            &self.dir(),
            &name.parse().unwrap(),
            Some("stolen"),
            self.now,
        )
    }

    /// `list`, one line a certificate.
    fn listed(&self) -> Vec<String> {
        let listed = list(&self.dir(), self.now).unwrap();
        let line = |c: &clamcast_certs::Listed| {
            let replaced = if c.replaced { " replaced" } else { "" };
            format!(
                "{} {} {:?} {:?}{replaced}",
                c.role, c.name, c.groups, c.state
            )
        };
        listed.iter().map(line).collect()
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir().join(path)).unwrap()
    }

    /// Every file of the fleet with its content.
    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        fn walk(dir: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, files);
                } else if !path.ends_with(".lock") {
                    files.push((path.clone(), fs::read(&path).unwrap()));
                }
            }
        }
        let mut files = Vec::new();
        walk(&self.dir(), &mut files);
        files.sort();
        files
    }

    fn der(&self, path: &str) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.read(path).as_bytes()).unwrap()
    }

    fn certificate(&self, path: &str) -> Certificate {
        Certificate::from_der(&self.der(path)).unwrap()
    }

    fn key(&self, path: &str) -> PublicKey {
        PublicKey::of(&SigningKey::from_pkcs8_pem(&self.read(path)).unwrap())
    }

    fn revocation_list(&self) -> RevocationList {
        let envelope: Envelope = serde_json::from_str(&self.read("revoked.json")).unwrap();
        let ca = self.certificate("ca.pem").key;
        let list: clamcast_proto::dsse::Verified<RevocationList> = envelope.verify([&ca]).unwrap();
        (*list).clone()
    }
}

/// The error's text has all of `parts`.
fn says<T>(result: Result<T, impl std::error::Error>, parts: &[&str]) {
    let text = result.err().expect("it should have failed").to_string();
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn the_ca_is_one_for_ten_years_and_signs_only_leaves() {
    let lab = Lab::initialised();
    let der = lab.der("ca.pem");
    let (_, ca) = X509Certificate::from_der(&der).unwrap();
    ca.verify_signature(None).unwrap();
    let constraints = ca.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical && constraints.value.ca);
    assert_eq!(constraints.value.path_len_constraint, Some(0));
    let usage = ca.key_usage().unwrap().unwrap().value;
    assert_eq!((usage.key_cert_sign(), usage.flags.count_ones()), (true, 1));
    assert_eq!(ca.subject().to_string(), "CN=clamcast bank CA");
    let facts = lab.certificate("ca.pem");
    assert_eq!(facts.not_before, lab.now - SignedDuration::from_hours(1));
    assert_eq!(facts.not_after.to_string(), "2040-01-02T00:00:00Z");
    assert_eq!(facts.key, lab.key("ca.key"));
}

#[test]
fn leaves_count_for_a_year_and_say_who_they_are() {
    let lab = Lab::with_master();
    lab.master(&["Mirror.example.net", "192.0.2.7", "[2001:db8::1]"], true)
        .unwrap();
    lab.agent("web1", &["canary", "dmz", "canary"], false)
        .unwrap();
    let ca_der = lab.der("ca.pem");
    let (_, ca) = X509Certificate::from_der(&ca_der).unwrap();
    let check = |path: &str, subject: &str, names: &[&str]| {
        let der = lab.der(path);
        let (_, leaf) = X509Certificate::from_der(&der).unwrap();
        leaf.verify_signature(Some(ca.public_key())).unwrap();
        assert_eq!(leaf.subject().to_string(), subject);
        assert_eq!(leaf.issuer(), ca.subject());
        assert!(!leaf.is_ca());
        assert!(leaf.key_usage().unwrap().unwrap().value.digital_signature());
        assert_eq!(leaf.raw_serial().len(), 16);
        let san = leaf.subject_alternative_name().unwrap().unwrap();
        let found: Vec<String> = san
            .value
            .general_names
            .iter()
            .map(GeneralName::to_string)
            .collect();
        assert_eq!(found, names);
        let facts = Certificate::from_der(&der).unwrap();
        assert_eq!(facts.not_after.to_string(), "2031-01-01T00:00:00Z");
        let usage = leaf.extended_key_usage().unwrap().unwrap().value.clone();
        (usage.server_auth, usage.client_auth)
    };
    let usage = check(
        "master/cert.pem",
        "CN=clamcast bank master",
        &[
            "URI(clamcast://bank/master)",
            "DNSName(mirror.example.net)",
            "IPAddress(c0:00:02:07)",
            "IPAddress(20:01:0d:b8:00:00:00:00:00:00:00:00:00:00:00:01)",
        ],
    );
    assert_eq!(usage, (true, false));
    let usage = check(
        "agents/web1/cert.pem",
        "CN=clamcast bank agent web1",
        &[
            "URI(clamcast://bank/agent/web1)",
            "URI(clamcast://bank/group/canary)",
            "URI(clamcast://bank/group/dmz)",
        ],
    );
    assert_eq!(usage, (false, true));
    assert_eq!(
        lab.key("agents/web1/key.pem"),
        lab.certificate("agents/web1/cert.pem").key
    );
}

#[test]
fn the_longest_names_fit() {
    let mut lab = Lab::empty();
    let long = "x".repeat(253);
    let agent = "x".repeat(AGENT_NAME_BYTES_MAX);
    init(&lab.dir(), &long.parse().unwrap(), false, lab.now).unwrap();
    lab.master(&["::1"], false).unwrap();
    let groups: Vec<String> = (10..74)
        .map(|n| format!("{}{n}", "g".repeat(251)))
        .collect();
    let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
    lab.agent(&agent, &groups, false).unwrap();
    let identity = lab
        .certificate(&format!("agents/{agent}/cert.pem"))
        .identity
        .unwrap();
    assert!(matches!(identity.role, Role::Agent { groups, .. } if groups.len() == 64));
    lab.now += SignedDuration::from_hours(1);
    assert_eq!(lab.revoke(&agent).unwrap().revoked.len(), 1);
}

#[test]
fn a_leaf_never_outlives_its_ca() {
    let mut lab = Lab::with_master();
    let ca = lab.certificate("ca.pem").not_after;
    lab.now = ca - SignedDuration::from_hours(24);
    assert_eq!(
        lab.agent("web1", &[], false).unwrap().certificate.not_after,
        ca
    );
    lab.now = ca;
    says(lab.agent("web2", &[], false), &["expired", "2040-01-02"]);
}

#[test]
fn the_key_set_verifies_and_pins_the_root() {
    let lab = Lab::with_master();
    let envelope: Envelope = serde_json::from_str(&lab.read("manifest.pub")).unwrap();
    let set = KeySet::verify(&envelope).unwrap();
    assert_eq!(
        (set.fleet.as_str(), set.version, set.epoch.0),
        ("bank", 1, 1)
    );
    assert_eq!(set.root, lab.key("root.key"));
    assert_eq!(set.manifest, [lab.key("manifest.key")]);
    assert_eq!(set.audit, [lab.key("audit.key")]);
    KeySet::verify_by(&envelope, &lab.key("root.key")).unwrap();
    assert!(KeySet::verify_by(&envelope, &lab.key("ca.key")).is_err());
}

#[test]
fn what_was_written_is_reported_with_fingerprint_and_expiry() {
    let lab = Lab::empty();
    let mut files = lab.init(false).unwrap().files;
    files.extend(lab.master(&["a"], false).unwrap().files);
    files.extend(lab.agent("web1", &[], false).unwrap().files);
    for file in &files {
        assert!(file.path.is_file(), "{}", file.path.display());
        let extension = file.path.extension().unwrap();
        assert_eq!(
            file.fingerprint.is_none(),
            extension == "toml",
            "{}",
            file.path.display()
        );
        let certificate = file.path.ends_with("ca.pem") || file.path.ends_with("cert.pem");
        assert_eq!(
            file.not_after.is_some(),
            certificate,
            "{}",
            file.path.display()
        );
    }
    assert_eq!(files.len(), 7 + 2 + 5);
    assert!(!lab.dir().join(".unfinished").exists());
}

#[test]
fn private_files_are_private() {
    let lab = Lab::with_master();
    lab.agent("web1", &[], false).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (path, _) in lab.files() {
        let private = path.extension().is_some_and(|e| e == "key") || path.ends_with("key.pem");
        let expected = if private { 0o600 } else { 0o644 };
        assert_eq!(mode(&path), expected, "{}", path.display());
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }
}

#[test]
fn nothing_is_overwritten_without_force() {
    let lab = Lab::with_master();
    lab.agent("web1", &[], false).unwrap();
    let before = lab.files();
    says(lab.init(false), &["fleet.toml is there", "EVERY HOST"]);
    says(
        lab.master(&["other"], false),
        &["master/key.pem is there", "--force"],
    );
    says(
        lab.agent("web1", &["g"], false),
        &["agents/web1/key.pem is there", "--force"],
    );
    assert_eq!(lab.files(), before);

    // A bundle that has left the directory is not a free name either.
    fs::remove_dir_all(lab.dir().join("agents/web1")).unwrap();
    says(
        lab.agent("web1", &[], false),
        &["counts until 2031-01-01", "--force"],
    );
    lab.agent("web1", &[], true).unwrap();
}

#[test]
fn force_reissues_with_other_groups_and_hosts() {
    let mut lab = Lab::with_master();
    let first = lab.agent("web1", &["old"], false).unwrap();
    fs::write(lab.dir().join("agents/web1/agent.toml"), "# edited\n").unwrap();
    lab.now += 1.hours();
    let master = lab.master(&["10.0.0.1", "::1"], true).unwrap();
    assert_eq!(master.left, ["mirror.example.net".parse().unwrap()]);
    let second = lab.agent("web1", &["new"], true).unwrap();
    assert_ne!(first.certificate.key, second.certificate.key);
    assert_eq!(second.earlier, [first.certificate]);
    assert_eq!(
        fs::read_to_string(second.saved.unwrap()).unwrap(),
        "# edited\n"
    );
    assert!(
        lab.read("agents/web1/agent.toml")
            .contains(r#"master = ["10.0.0.1:7310", "[::1]:7310"]"#)
    );
    assert_eq!(
        lab.listed(),
        [
            "master master [] Valid replaced",
            "master master [] Valid",
            "agent web1 [old] Valid replaced",
            "agent web1 [new] Valid",
        ]
    );
    assert_eq!(lab.agent("web1", &["new"], true).unwrap().saved, None);
}

#[test]
fn a_forced_init_keeps_the_old_keys_aside() {
    let lab = Lab::with_master();
    lab.agent("web1", &[], false).unwrap();
    let old = lab.read("root.key");
    let done = lab.init(true).unwrap();
    let aside = done.moved_to.unwrap();
    assert!(aside.ends_with("replaced-20300101T000000Z-1"));
    assert_eq!(fs::read_to_string(aside.join("root.key")).unwrap(), old);
    assert!(aside.join("agents/web1/key.pem").is_file());
    assert_ne!(lab.read("root.key"), old);
    assert_eq!(lab.listed(), [""; 0]);
    says(lab.agent("web1", &[], false), &["clamcast-certs master"]);
    assert!(
        lab.init(true)
            .unwrap()
            .moved_to
            .unwrap()
            .ends_with("replaced-20300101T000000Z-2")
    );
}

#[test]
fn an_init_that_was_interrupted_is_recognised_and_run_again() {
    let lab = Lab::initialised();
    fs::write(lab.dir().join(".unfinished"), "").unwrap();
    fs::remove_file(lab.dir().join("fleet.toml")).unwrap();
    for path in ["ca.pem", "audit.key"] {
        fs::remove_file(lab.dir().join(path)).unwrap();
    }
    says(
        lab.master(&["a"], false),
        &["did not finish", "clamcast-certs init"],
    );
    says(list(&lab.dir(), lab.now), &["did not finish"]);
    assert!(lab.init(false).unwrap().resumed);
    lab.master(&["a"], false).unwrap();
    lab.agent("web1", &[], false).unwrap();
}

#[test]
fn everything_but_init_and_rotate_works_without_the_root_key() {
    let lab = Lab::initialised();
    fs::remove_file(lab.dir().join("root.key")).unwrap();
    lab.master(&["a"], false).unwrap();
    lab.agent("web1", &[], false).unwrap();
    lab.revoke("web1").unwrap();
    assert_eq!(lab.listed().len(), 2);
}

#[test]
fn an_agent_needs_a_master_and_both_need_a_fleet() {
    let lab = Lab::empty();
    says(
        lab.agent("web1", &[], false),
        &["holds no fleet", "clamcast-certs init"],
    );
    assert!(!lab.dir().exists());
    fs::create_dir(lab.dir()).unwrap();
    says(lab.master(&["a"], false), &["holds no fleet"]);
    assert_eq!(fs::read_dir(lab.dir()).unwrap().count(), 0);
    lab.init(false).unwrap();
    says(
        lab.agent("web1", &[], false),
        &["no certificate yet", "clamcast-certs master"],
    );
    says(lab.master(&[], false), &["no --host"]);
}

#[test]
fn hostile_names_are_refused() {
    for name in ["../x", "a/b", "", ".", "..", "-x", "a b", "x\n", "x\0", "é"] {
        assert!(name.parse::<AgentName>().is_err(), "{name:?}");
    }
    let lab = Lab::with_master();
    let many: Vec<String> = (0..65).map(|n| format!("g{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    says(lab.agent("web1", &many, false), &["65 groups"]);
    let many: Vec<String> = (0..17).map(|n| format!("h{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    says(lab.master(&many, true), &["17 hosts"]);
    lab.agent("web1", &[], false).unwrap();
    let reason = |reason: &str| revoke(&lab.dir(), &"web1".parse().unwrap(), Some(reason), lab.now);
    says(reason("a\u{1b}[2J"), &["control characters"]);
    says(reason(&"x".repeat(201)), &["longer than 200"]);
}

#[test]
fn a_revoked_agent_is_on_the_list_that_the_ca_signed() {
    let mut lab = Lab::with_master();
    lab.agent("web1", &[], false).unwrap();
    lab.now += 1.hours();
    lab.agent("web1", &[], true).unwrap();
    lab.agent("web2", &[], false).unwrap();
    let done = lab.revoke("web1").unwrap();
    assert_eq!((done.version, done.revoked.len()), (1, 2));
    let signed = lab.revocation_list();
    assert_eq!((signed.fleet.as_str(), signed.version), ("bank", 1));
    assert_eq!(signed.revoked[0].reason.as_deref(), Some("stolen"));
    let certificate = lab.certificate("agents/web1/cert.pem");
    assert_eq!(signed.entry(&certificate).unwrap().name.as_str(), "web1");
    assert!(
        signed
            .entry(&lab.certificate("agents/web2/cert.pem"))
            .is_none()
    );
    assert_eq!(
        lab.listed()[1..],
        [
            "agent web1 [] Revoked replaced",
            "agent web1 [] Revoked",
            "agent web2 [] Valid",
        ]
    );

    assert_eq!(lab.revoke("web2").unwrap().version, 2);
    assert_eq!(lab.revocation_list().revoked.len(), 3);
}

#[test]
fn revoking_twice_changes_nothing_and_says_so() {
    let lab = Lab::with_master();
    lab.agent("web1", &[], false).unwrap();
    lab.revoke("web1").unwrap();
    let before = lab.files();
    let again = lab.revoke("web1").unwrap();
    assert!(again.revoked.is_empty());
    assert_eq!(again.before.len(), 1);
    assert_eq!(lab.files(), before);
}

#[test]
fn a_revoked_name_gets_a_new_certificate_that_counts() {
    let mut lab = Lab::with_master();
    lab.agent("web1", &[], false).unwrap();
    lab.revoke("web1").unwrap();
    lab.now += 1.hours();
    assert!(lab.agent("web1", &[], true).unwrap().earlier.is_empty());
    let expected = ["agent web1 [] Revoked replaced", "agent web1 [] Valid"];
    assert_eq!(lab.listed()[1..], expected);
}

#[test]
fn an_unknown_name_is_answered_with_the_nearest() {
    let lab = Lab::with_master();
    lab.agent("web1.example.net", &[], false).unwrap();
    says(
        lab.revoke("wbe1.example.net"),
        &["did you mean `web1.example.net`?"],
    );
    says(lab.revoke("zzz"), &["clamcast-certs list"]);
    says(lab.revoke("master"), &["new CA"]);
    assert!(!lab.dir().join("revoked.json").exists());
}

#[test]
fn without_the_record_bundles_are_listed_and_revoked_and_nothing_counts_as_never_issued() {
    let lab = Lab::with_master();
    lab.agent("web1", &["dmz"], false).unwrap();
    lab.agent("web2", &[], false).unwrap();
    let whole = lab.listed();
    let recorded = |lab: &Lab| {
        let listed = list(&lab.dir(), lab.now).unwrap();
        listed.iter().filter(|one| one.recorded).count()
    };
    assert_eq!(recorded(&lab), 3);
    fs::remove_dir_all(lab.dir().join("issued")).unwrap();
    assert_eq!((lab.listed(), recorded(&lab)), (whole, 0));
    let revocation = lab.revoke("web1").unwrap();
    assert!(revocation.revoked.len() == 1 && !revocation.recorded);
    let gone = [
        "record of what was issued is gone",
        "fleet/issued",
        "backup",
    ];
    says(lab.revoke("web3"), &gone);
    for bundles in ["master", "agents"] {
        fs::remove_dir_all(lab.dir().join(bundles)).unwrap();
    }
    says(list(&lab.dir(), lab.now), &gone);
    let fresh = Lab::initialised();
    assert!(fresh.listed().is_empty());
}

#[test]
fn a_list_of_another_ca_is_not_built_upon() {
    let [ours, other] = [Lab::with_master(), Lab::with_master()];
    for lab in [&ours, &other] {
        lab.agent("web1", &[], false).unwrap();
        lab.revoke("web1").unwrap();
    }
    let list = ours.dir().join("revoked.json");
    fs::copy(other.dir().join("revoked.json"), &list).unwrap();
    says(ours.revoke("web1"), &["not the list that this CA signed"]);
    fs::write(&list, "{").unwrap();
    says(ours.revoke("web1"), &["damaged", "backup"]);
    says(clamcast_certs::list(&ours.dir(), ours.now), &["damaged"]);
}

#[test]
fn certificates_are_listed_by_what_they_still_count() {
    let mut lab = Lab::with_master();
    lab.agent("web1", &["dmz"], false).unwrap();
    let state = |lab: &Lab| list(&lab.dir(), lab.now).unwrap()[1].state;
    assert_eq!(state(&lab), State::Valid);
    lab.now += SignedDuration::from_hours(24 * 336);
    assert_eq!(state(&lab), State::Expiring);
    lab.now += SignedDuration::from_hours(24 * 29);
    assert_eq!(state(&lab), State::Expired);
    assert!(lab.revoke("web1").unwrap().revoked.is_empty());
    lab.agent("web1", &[], true).unwrap();

    let json = serde_json::to_value(list(&lab.dir(), lab.now).unwrap()).unwrap();
    assert_eq!(json[1]["name"], "web1");
    assert_eq!(json[1]["role"], "agent");
    assert_eq!(json[1]["groups"][0], "dmz");
    assert_eq!(json[1]["state"], "expired");
    assert_eq!(json[1]["replaced"], true);
    assert_eq!(json[1]["serial"].as_str().unwrap().len(), 32);
    assert_eq!(json[1]["fingerprint"].as_str().unwrap().len(), 64);
    assert_eq!(json[1]["not_after"], "2031-01-01T00:00:00Z");
}

#[test]
fn damage_is_named_by_its_file() {
    let check = |path: &str, content: &str, parts: &[&str]| {
        let lab = Lab::with_master();
        lab.agent("web1", &[], false).unwrap();
        fs::write(lab.dir().join(path), content).unwrap();
        says(lab.agent("web2", &[], false), parts);
        assert!(!lab.dir().join("agents/web2").exists());
    };
    check("ca.pem", "x", &["ca.pem is damaged"]);
    check("ca.key", "x", &["ca.key is damaged", "PKCS#8"]);
    check("manifest.pub", "x", &["manifest.pub is damaged"]);
    check(
        "fleet.toml",
        "flet = 1",
        &["fleet.toml:1", "`flet`", "`fleet`"],
    );
    let other = Lab::initialised();
    let wrong_key = ["ca.key is not the key of", "ca.pem"];
    check("ca.key", &other.read("ca.key"), &wrong_key);
    check(
        "manifest.pub",
        &"x".repeat(1 << 20),
        &["manifest.pub has more than", "backup"],
    );
}

#[test]
fn writers_wait_for_each_other() {
    let lab = Lab::with_master();
    std::thread::scope(|scope| {
        for n in 0..8 {
            let lab = &lab;
            scope.spawn(move || lab.agent(&format!("web{n}"), &[], false).unwrap());
        }
    });
    assert_eq!(lab.listed().len(), 9);
}

#[test]
fn a_writer_that_never_ends_is_named_and_readers_pass_it() {
    let lab = Lab::with_master();
    let _held = clamcast_daemon::durable::lock(&lab.dir().join(".lock")).unwrap();
    let pid = format!("(pid {})", std::process::id());
    says(
        lab.agent("web1", &[], false),
        &["locked by another process", &pid],
    );
    assert_eq!(lab.listed().len(), 1);
}

#[test]
fn the_bundle_is_a_configuration_with_and_without_its_comments() {
    let lab = Lab::with_master();
    lab.agent("web1", &[], false).unwrap();
    let text = lab.read("agents/web1/agent.toml");
    let active: toml::Table = text.parse().unwrap();
    assert_eq!(
        active["master"][0].as_str(),
        Some("mirror.example.net:7310")
    );
    let bundle = lab.dir().join("agents/web1");
    for path in [
        &active["tls"]["ca"],
        &active["tls"]["cert"],
        &active["tls"]["key"],
        &active["trust"]["keys"],
    ] {
        assert!(bundle.join(path.as_str().unwrap()).is_file(), "{path}");
    }
    assert_eq!(lab.read("agents/web1/ca.pem"), lab.read("ca.pem"));
    assert_eq!(
        lab.read("agents/web1/manifest.pub"),
        lab.read("manifest.pub")
    );

    let uncommented: String = text
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(key) if key.contains(" = ") => format!("{key}\n"),
            Some(_) | None => format!("{line}\n"),
        })
        .collect();
    let all: toml::Table = uncommented.parse().unwrap();
    assert_eq!(all["clamd"].as_table().unwrap().len(), 7);
    assert_eq!(all["database"]["rescan"].as_str(), Some("1h"));
}

#[test]
fn serials_and_keys_are_never_the_same_twice() {
    let lab = Lab::with_master();
    let mut serials = std::collections::BTreeSet::new();
    for n in 0..50 {
        let issued = lab.agent(&format!("web{n}"), &[], false).unwrap();
        assert_eq!(issued.certificate.serial.0.len(), 32);
        assert!(serials.insert(issued.certificate.serial));
    }
}

impl Lab {
    fn rotate(&self, rotated: Rotated, change: Change) -> Result<Rotation, RotateError> {
        rotate(&self.dir(), rotated, change, self.now)
    }

    fn key_set(&self) -> KeySet {
        let text = fs::read(self.dir().join("manifest.pub")).unwrap();
        let envelope: Envelope = serde_json::from_slice(&text).unwrap();
        (*KeySet::verify(&envelope).unwrap()).clone()
    }

    fn has(&self, name: &str) -> bool {
        self.dir().join(name).exists()
    }
}

#[test]
fn a_rotation_puts_a_new_key_before_the_old_ones_and_keeps_the_one_before() {
    let lab = Lab::with_master();
    let before = lab.key_set();
    let [old_manifest, old_audit] = ["manifest.key", "audit.key"].map(|name| lab.key(name));
    let rotation = lab.rotate(Rotated::Audit, Change::Add).unwrap();
    assert_eq!((rotation.version, rotation.keys), (2, 2));
    let set = lab.key_set();
    assert_eq!(set.audit, [lab.key("audit.key"), old_audit.clone()]);
    assert_eq!((&set.manifest, set.epoch), (&before.manifest, before.epoch));
    assert_eq!(lab.key("audit.key.old"), old_audit);
    let mode = fs::metadata(lab.dir().join("audit.key"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    lab.rotate(Rotated::Manifest, Change::Add).unwrap();
    let set = lab.key_set();
    assert_eq!(set.version, 3);
    assert_eq!(set.manifest, [lab.key("manifest.key"), old_manifest]);
    // New hosts get the newest set.
    let issued = lab.agent("web1", &[], false).unwrap();
    let given = fs::read(issued.bundle.join("manifest.pub")).unwrap();
    assert_eq!(given, fs::read(lab.dir().join("manifest.pub")).unwrap());
}

#[test]
fn old_keys_are_dropped_on_demand_and_without_old_manifest_keys_an_epoch_begins() {
    let lab = Lab::with_master();
    for (rotated, name, epoch) in [
        (Rotated::Audit, "audit.key", 1),
        (Rotated::Manifest, "manifest.key", 2),
    ] {
        let nothing = lab.rotate(rotated, Change::DropOld).unwrap();
        assert_eq!(nothing.outcome, Outcome::Unchanged);
        let old = lab.key(name);
        lab.rotate(rotated, Change::Add).unwrap();
        let dropped = lab.rotate(rotated, Change::DropOld).unwrap();
        assert_eq!(dropped.dropped, [old.id()]);
        assert_eq!(dropped.epoch.0, epoch);
        let set = lab.key_set();
        let keys = match rotated {
            Rotated::Audit => set.audit,
            Rotated::Manifest => set.manifest,
        };
        assert_eq!(keys, [lab.key(name)]);
        // The audit key may be restored until the next rotation.
        let is_kept = lab.has(&format!("{name}.old"));
        assert_eq!(is_kept, rotated == Rotated::Audit);
    }
}

fn names(files: &[Written]) -> Vec<&str> {
    files
        .iter()
        .filter_map(|file| file.path.file_name()?.to_str())
        .collect()
}

#[test]
fn every_rotation_names_the_key_set_before_the_private_key() {
    let lab = Lab::with_master();
    for change in [
        Change::Add,
        Change::DropOld,
        Change::RestoreOld,
        Change::RestoreOld,
    ] {
        let rotation = lab.rotate(Rotated::Audit, change).unwrap();
        assert_eq!(
            names(&rotation.files),
            ["manifest.pub", "audit.key"],
            "{change:?}"
        );
    }
}

#[test]
fn a_rotation_replaces_a_lost_key_and_refuses_a_foreign_one() {
    let lab = Lab::with_master();
    for (rotated, name) in [
        (Rotated::Manifest, "manifest.key"),
        (Rotated::Audit, "audit.key"),
    ] {
        let path = lab.dir().join(name);
        fs::copy(lab.dir().join("ca.key"), &path).unwrap();
        let refused = lab.rotate(rotated, Change::Add).unwrap_err();
        assert!(matches!(refused, RotateError::Key { .. }), "{refused}");

        fs::remove_file(&path).unwrap();
        lab.rotate(rotated, Change::DropOld).unwrap_err();
        let rotation = lab.rotate(rotated, Change::Add).unwrap();
        assert_eq!((rotation.keys, rotation.old), (2, None));
        let mut set = lab.key_set();
        let keys = match rotated {
            Rotated::Audit => &mut set.audit,
            Rotated::Manifest => &mut set.manifest,
        };
        assert_eq!(keys[0], lab.key(name));
    }
}

#[test]
fn a_repeated_drop_after_a_crash_names_the_key_set_that_was_written() {
    let lab = Lab::with_master();
    let old = lab.dir().join("manifest.key.old");
    lab.rotate(Rotated::Manifest, Change::Add).unwrap();
    let kept = fs::read(&old).unwrap();
    let version = lab
        .rotate(Rotated::Manifest, Change::DropOld)
        .unwrap()
        .version;
    fs::write(&old, kept).unwrap(); // the crash came before it was removed

    let again = lab.rotate(Rotated::Manifest, Change::DropOld).unwrap();
    assert_eq!(
        (again.outcome, again.version),
        (Outcome::Unchanged, version)
    );
    assert_eq!(names(&again.files), ["manifest.pub", "manifest.key"]);
    assert!(!lab.has("manifest.key.old"));
}

#[test]
fn an_interrupted_rotation_is_completed_before_old_keys_are_dropped() {
    let lab = Lab::with_master();
    let path = |name: &str| lab.dir().join(name);
    let old = lab.key("audit.key");
    lab.rotate(Rotated::Audit, Change::Add).unwrap();
    fs::rename(path("audit.key"), path("audit.key.next")).unwrap();
    fs::rename(path("audit.key.old"), path("audit.key")).unwrap();

    let resumed = lab.rotate(Rotated::Audit, Change::DropOld).unwrap();
    assert_eq!(resumed.outcome, Outcome::Resumed);
    assert_eq!(names(&resumed.files), ["manifest.pub", "audit.key"]);
    assert_eq!(lab.key_set().audit, [lab.key("audit.key"), old.clone()]);
    let dropped = lab.rotate(Rotated::Audit, Change::DropOld).unwrap();
    assert_eq!(dropped.dropped, [old.id()]);
}

#[test]
fn a_dropped_audit_key_is_restored_to_the_key_set() {
    let lab = Lab::with_master();
    let old = lab.key("audit.key");
    lab.rotate(Rotated::Audit, Change::Add).unwrap();
    let dropped = lab.rotate(Rotated::Audit, Change::DropOld).unwrap();
    let restored = lab.rotate(Rotated::Audit, Change::RestoreOld).unwrap();
    assert_eq!(restored.version, dropped.version + 1);
    assert_eq!(lab.key_set().audit, [lab.key("audit.key"), old]);
    let again = lab.rotate(Rotated::Audit, Change::RestoreOld).unwrap();
    assert_eq!(
        (again.outcome, again.version),
        (Outcome::Unchanged, restored.version)
    );
}

#[test]
fn an_interrupted_rotation_loses_no_key_and_goes_on_where_it_stopped() {
    // What is on disk after a crash at each point; see the table in rotate.rs.
    for crashed_after in ["new key", "key set", "old key aside"] {
        let lab = Lab::with_master();
        let path = |name: &str| lab.dir().join(name);
        let old = lab.key("manifest.key");
        let set = fs::read(path("manifest.pub")).unwrap();
        lab.rotate(Rotated::Manifest, Change::Add).unwrap();
        let new = lab.key("manifest.key");
        fs::rename(path("manifest.key"), path("manifest.key.next")).unwrap();
        if crashed_after != "old key aside" {
            fs::rename(path("manifest.key.old"), path("manifest.key")).unwrap();
        }
        if crashed_after == "new key" {
            fs::write(path("manifest.pub"), set).unwrap();
        }

        let rotation = lab.rotate(Rotated::Manifest, Change::Add).unwrap();
        assert_eq!(rotation.version, 2, "{crashed_after}");
        assert_eq!(lab.key_set().manifest, [new.clone(), old.clone()]);
        assert_eq!(lab.key("manifest.key"), new, "{crashed_after}");
        assert_eq!(lab.key("manifest.key.old"), old, "{crashed_after}");
        assert!(!lab.has("manifest.key.next"));
    }
}

#[test]
fn a_key_set_holds_a_bounded_number_of_keys_and_the_oldest_go_first() {
    let lab = Lab::with_master();
    let first = lab.key("audit.key");
    let dropped: Vec<_> = (0..KEYS_MAX)
        .map(|_| lab.rotate(Rotated::Audit, Change::Add).unwrap().dropped)
        .collect();
    assert_eq!(dropped.concat(), [first.id()]);
    assert_eq!(lab.key_set().audit.len(), KEYS_MAX);
}

#[test]
fn a_rotation_without_the_right_root_key_changes_nothing() {
    let lab = Lab::with_master();
    let before = fs::read(lab.dir().join("manifest.pub")).unwrap();
    let root = lab.dir().join("root.key");
    fs::copy(lab.dir().join("ca.key"), &root).unwrap();
    let refused = lab.rotate(Rotated::Manifest, Change::Add).unwrap_err();
    assert!(matches!(refused, RotateError::Root { .. }), "{refused}");
    fs::remove_file(root).unwrap(); // it is offline
    lab.rotate(Rotated::Manifest, Change::Add).unwrap_err();
    assert_eq!(fs::read(lab.dir().join("manifest.pub")).unwrap(), before);
    assert!(!lab.has("manifest.key.next"));
}
