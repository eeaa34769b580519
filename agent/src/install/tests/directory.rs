//! Directories that are not as they should be.

use super::*;

fn open_directories(database: &Path, host: &Host) -> Result<disk::Tree, HostFault> {
    disk::Tree::open_directories(database, &host.state(), disk::Direct)
}

#[test]
fn planted_links_pipes_and_names_do_nothing() {
    let host = Host::with(1, "daily.cld@1=one");
    let outside = host.state().join("outside");
    fs::write(&outside, "untouched").unwrap();
    let new = "daily.cld@2=two x.ndb=x y.ndb=y";
    symlink(&outside, host.database().join("x.ndb")).unwrap();
    nix::unistd::mkfifo(
        &host.database().join("y.ndb"),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    fs::remove_file(host.database().join("daily.cld")).unwrap();
    fs::hard_link(&outside, host.database().join("daily.cld")).unwrap();
    let completed = host.take(&host.start(), &manifest(2, new), new).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(host.there(), set(new));
    assert_eq!(fs::read_to_string(outside).unwrap(), "untouched");
}

#[test]
fn a_hidden_directory_that_others_may_write_is_not_used() {
    let host = Host::new();
    fs::create_dir(host.hidden("")).unwrap();
    fs::set_permissions(host.hidden(""), fs::Permissions::from_mode(0o777)).unwrap();
    let fault = open_directories(&host.database(), &host).err().unwrap();
    assert!(matches!(fault, HostFault::Planted { .. }), "{fault}");
    fs::remove_dir(host.hidden("")).unwrap();
    symlink(host.state(), host.database().join(disk::HIDDEN)).unwrap();
    let fault = open_directories(&host.database(), &host).err().unwrap();
    assert!(matches!(fault, HostFault::Planted { .. }), "{fault}");
}

#[test]
fn a_database_directory_has_one_agent_whatever_its_state_directory() {
    let host = Host::new();
    let open = |state: &str| {
        let state = host.state().join(state);
        fs::create_dir_all(&state).unwrap();
        let database = host.database();
        let settings = Settings { database, state };
        Installer::open(&settings, Nonce([3; 16]), host.clamd.clone())
    };
    let first = open("one").map_err(|fault| fault.to_string()).unwrap();
    let fault = open("two").err().unwrap();
    let text = fault.to_string();
    assert!(matches!(fault, HostFault::Shared { .. }), "{text}");
    let database = host.database();
    assert!(text.contains(database.to_str().unwrap()), "{text}");
    drop(first);
    assert!(open("two").is_ok());
}

#[test]
fn a_link_planted_as_the_lock_is_not_followed() {
    let host = Host::new();
    host.start();
    symlink(host.state().join("elsewhere"), host.hidden("lock")).unwrap();
    let tree = open_directories(&host.database(), &host).unwrap();
    assert!(tree.locked().is_err());
    assert!(!host.state().join("elsewhere").exists());
}

#[test]
fn a_missing_directory_is_named_with_the_command_that_makes_it() {
    let host = Host::new();
    let missing = host.database().join("none");
    let fault = open_directories(&missing, &host).err().unwrap();
    assert!(fault.to_string().contains("install -d -o "), "{fault}");
}

#[test]
fn a_replaced_or_emptied_directory_is_worked_on_and_the_one_that_was_open_is_not() {
    for emptied in [false, true] {
        let host = Host::with(1, "daily.cld@1=one");
        let installer = host.start();
        let moved = host.state().join("moved");
        fs::rename(host.database(), &moved).unwrap();
        fs::create_dir(host.database()).unwrap();
        if emptied {
            // With the same inode, as after `rm -r DB/* DB/.clamcast`.
            fs::remove_dir(host.database()).unwrap();
            fs::rename(&moved, host.database()).unwrap();
            fs::remove_dir_all(host.hidden("")).unwrap();
            fs::remove_file(host.database().join("daily.cld")).unwrap();
        }
        let line = "daily.cld@2=two";
        let completed = host.take(&installer, &manifest(2, line), line).unwrap();
        assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
        assert_eq!(host.there(), set(line));
        if !emptied {
            assert_eq!(loaded(&moved)["daily.cld"], "one");
        }
    }
}

#[test]
fn an_install_that_was_interrupted_is_ended_once_a_missing_directory_is_back() {
    let host = Host::with(1, "daily.cld@1=one");
    let line = "daily.cld@2=two";
    let journal = host.state().join("journal.json");
    let mut call = 0;
    while !journal.exists() {
        if let Ok((installer, _)) = host.start_on(host.shim(Fault::Stop(call))) {
            let _ = host.take(&installer, &manifest(2, line), line);
        }
        call += 1;
    }
    let away = host.state().join("away");
    fs::rename(host.database(), &away).unwrap();
    let settings = Settings {
        database: host.database(),
        state: host.state(),
    };
    let installer = Installer::open(&settings, Nonce([3; 16]), host.clamd.clone()).unwrap();
    for _ in 0..2 {
        let Look::Blocked(reason) = look(&installer, Depth::Surface) else {
            panic!("there is no directory");
        };
        assert!(reason.contains("install -d -o "), "{reason}");
        let planned = plan(&installer, &manifest(2, line), false);
        assert!(planned.unwrap_err().to_string().contains("no directory"));
    }
    fs::rename(&away, host.database()).unwrap();
    assert_eq!(look(&installer, Depth::Surface), Look::NotNow);
    let completed = host.probe_on(&installer).unwrap();
    assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
    assert_eq!(host.there(), set(line));
}
