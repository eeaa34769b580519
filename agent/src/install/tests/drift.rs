//! Files that are not what was installed.

use super::*;

#[test]
fn drift_is_seen_and_repaired_from_the_hosts_own_copy() {
    let line = "daily.cld@1=one x.ndb=x";
    let host = Host::with(1, line);
    let installer = host.start();
    host.put("daily.cld=own");
    fs::remove_file(host.database().join("x.ndb")).unwrap();
    let wrong = |checks: Vec<FileCheck>| checks.iter().filter(|check| !check.is_right()).count();
    assert_eq!(wrong(installer.verify()), 2);
    let completed = host.repair(&installer).unwrap().unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(wrong(installer.verify()), 0);
    assert_eq!(host.there(), set(line));
}

#[test]
fn damage_that_the_hard_link_shares_is_not_repaired_from_it() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    // In place, with the same length and time: only a hash tells.
    let path = host.database().join("daily.cld");
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    let mut file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all(b"onE").unwrap();
    file.set_modified(time).unwrap();
    let error = host.repair(&installer).unwrap_err();
    assert!(error.contains("the master has to send them"), "{error}");
    let offer = manifest(1, "daily.cld@1=one");
    let completed = host.take(&installer, &offer, "daily.cld@1=one").unwrap();
    assert_eq!(completed.outcome, Outcome::Live);
    assert_eq!(host.there(), set("daily.cld=one"));
}

/// What a look says of a host that has this set, after `damage`.
fn sight(depth: Depth, damage: impl FnOnce(&Host)) -> String {
    let host = Host::with(1, "daily.cld@1=one main.cvd@62=main");
    let installer = host.start();
    // What is read in this look is known in the next one.
    assert_eq!(wrong(&installer, Depth::Full), []);
    damage(&host);
    let wrong = wrong(&installer, depth);
    let words = wrong.iter().map(|wrong| {
        let read = wrong.state.as_ref().map_or("", |_| " and read");
        format!("{} {:?}{read}", wrong.name, wrong.found)
    });
    words.collect::<Vec<_>>().join(", ")
}

#[test]
fn a_look_names_what_is_wrong_and_reads_what_was_touched() {
    let daily = |host: &Host| host.database().join("daily.cld");
    for depth in [Depth::Touched, Depth::Full] {
        let check = |damage: &dyn Fn(&Host), expected: &str| {
            assert_eq!(sight(depth, damage), expected, "{depth:?}");
        };
        check(&|_| (), "");
        check(
            &|host| fs::write(daily(host), "onE").unwrap(),
            "daily.cld Changed and read",
        );
        check(
            &|host| fs::write(daily(host), "o").unwrap(),
            "daily.cld Changed and read",
        );
        check(
            &|host| fs::write(daily(host), "much too long").unwrap(),
            "daily.cld Changed",
        );
        check(
            &|host| fs::remove_file(daily(host)).unwrap(),
            "daily.cld Missing",
        );
        let mode = |mode: u32| {
            move |host: &Host| {
                fs::set_permissions(daily(host), fs::Permissions::from_mode(mode)).unwrap();
            }
        };
        check(&mode(0o600), "daily.cld Unreadable and read");
        check(&mode(0o666), "daily.cld Changed and read");
        let instead = |make: &dyn Fn(&std::path::Path)| {
            sight(depth, |host| {
                fs::remove_file(daily(host)).unwrap();
                make(&daily(host));
            })
        };
        assert_eq!(
            instead(&|path| fs::create_dir(path).unwrap()),
            "daily.cld Changed"
        );
        assert_eq!(
            instead(&|path| symlink("main.cvd", path).unwrap()),
            "daily.cld Changed"
        );
        let pipe = |path: &std::path::Path| {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        };
        assert_eq!(instead(&pipe), "daily.cld Changed");
        assert_eq!(
            instead(&|path| fs::write(path, "one").unwrap()),
            "",
            "put back by somebody"
        );
        check(
            &|host| host.put("daily.cvd=theirs"),
            "daily.cld Changed and read",
        );
        check(&|host| host.put("other.ndb=theirs"), "");
        let canary = |host: &Host| fs::remove_file(host.database().join(CANARY)).unwrap();
        check(&canary, "clamcast-canary.hsb Missing");
    }
}

#[test]
fn a_look_gives_way_and_does_not_judge_an_install_under_way() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let stop = CancellationToken::new();
    stop.cancel();
    assert_eq!(block_on(installer.look(Depth::Full, stop)).0, Look::Stopped);
    let engine = installer.engine.try_lock().unwrap();
    assert_eq!(look(&installer, Depth::Full), Look::NotNow);
    drop(engine);
    let nothing = Host::new();
    assert_eq!(wrong(&nothing.start(), Depth::Full), []);
}

#[test]
fn whatever_stands_in_the_place_of_a_file_is_repaired_and_proven_anew() {
    let line = "daily.cld@1=one x.ndb=x y.ndb=y z.ndb=z w.ndb=w";
    let host = Host::with(1, line);
    let installer = host.start();
    let number = host.canary();
    let at = |name: &str| host.database().join(name);
    for name in ["daily.cld", "x.ndb", "y.ndb"] {
        fs::remove_file(at(name)).unwrap();
    }
    fs::create_dir(at("daily.cld")).unwrap();
    fs::write(at("daily.cld").join("inside"), "kept").unwrap();
    symlink("z.ndb", at("x.ndb")).unwrap();
    nix::unistd::mkfifo(&at("y.ndb"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::set_permissions(at("z.ndb"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::remove_file(at(GATE)).unwrap();
    let found = wrong(&installer, Depth::Touched);
    assert_eq!(found.len(), 5, "{found:?}");
    let completed = host.repair(&installer).unwrap().unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert!(completed.install > number);
    assert_eq!(host.there(), set(line));
    assert_eq!(wrong(&installer, Depth::Full), []);
    let kept = host.hidden("adopted/daily.cld.directory/inside");
    assert_eq!(fs::read_to_string(kept).unwrap(), "kept");
}

#[test]
fn a_file_that_came_right_by_itself_is_proven_anew() {
    let line = "daily.cld@1=one";
    let host = Host::with(1, line);
    let installer = host.start();
    let number = host.canary();
    let aside = host.state().join("aside");
    fs::rename(host.database().join("daily.cld"), &aside).unwrap();
    assert_ne!(wrong(&installer, Depth::Touched), []);
    // Meanwhile clamd may have loaded the directory without it.
    fs::rename(&aside, host.database().join("daily.cld")).unwrap();
    let completed = host.repair(&installer).unwrap().unwrap();
    assert!(completed.install > number);
}
