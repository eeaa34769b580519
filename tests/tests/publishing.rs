//! What the master publishes, by the word of the real ClamAV.

use std::fs;

use clamcast_tests::lab::{Container, Fleet, PATIENCE, signatures, until};
use clamcast_tests::require;

#[test]
fn a_set_that_clamscan_cannot_load_is_refused_with_its_reason() {
    require!(Clamscan);
    let fleet = Fleet::new();
    let mirror = fleet.join("mirror");
    fs::create_dir_all(&mirror).unwrap();
    let good = Container::new("daily", 1).member("hsb", signatures(0..10));
    good.write(&mirror);
    let mut master = fleet.master(&mirror);
    master.configure("require = []", "require = []\nload_test = \"always\"");
    master.start();
    master.wait_generation(1);

    Container::refused_by_clamd("daily", 2).write(&mirror);
    let reason = until(PATIENCE, "refused", || {
        let status = master.json(&["status"]).unwrap();
        let reason = status["refused"]["reason"].as_str();
        reason.map(str::to_owned).ok_or(status)
    });
    assert!(reason.starts_with("the load test failed: "), "{reason}");
    assert!(reason.contains("Malformed database"), "{reason}");
    assert_eq!(master.json(&["status"]).unwrap()["generation"], 1);
    assert_eq!(master.audit("refused").len(), 1);

    let repaired = Container::new("daily", 3).member("hsb", signatures(0..11));
    repaired.write(&mirror);
    master.wait_generation(2);
}
