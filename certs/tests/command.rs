//! The command line: exit codes, and what is said where.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs the command in `dir`; the result is to have the exit code, and stdout and stderr together
/// all of `words`.
fn check(dir: &Path, line: &str, code: i32, words: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_clamcast-certs"))
        .args(line.split_whitespace())
        .current_dir(dir)
        .output()
        .unwrap();
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8(said).unwrap();
    assert_eq!(output.status.code(), Some(code), "{line}: {said}");
    for word in words {
        assert!(said.contains(word), "{line}: `{word}` is not in: {said}");
    }
    output
}

#[test]
fn each_command_says_what_it_wrote_and_what_comes_next() {
    let scratch = tempfile::tempdir().unwrap();
    let check = |line, words: &[&str]| check(scratch.path(), line, 0, words);
    check(
        "init --dir f --fleet bank",
        &[
            "f/root.key",
            "offline",
            "SHA-256",
            "expires",
            "next: clamcast-certs master --dir f",
        ],
    );
    check(
        "master --dir f --host mirror --host ::1",
        &[
            "f/master/cert.pem",
            "expires",
            "next: clamcast-certs agent --dir f",
        ],
    );
    check(
        "agent --dir f web1 --group dmz --group eu",
        &[
            "f/agents/web1/agent.toml",
            "web1 is in groups dmz, eu",
            "next: copy f/agents/web1",
        ],
    );
    check(
        "agent --dir f web1 --force",
        &[
            "1 certificate from before",
            "web1 was in groups dmz, eu",
            "web1 is in no group",
        ],
    );
    check(
        "master --dir f --host b --force",
        &["look for the master at mirror, ::1 too"],
    );
    check(
        "list --dir f",
        &["NAME", "web1", "agent", "valid", "dmz, eu"],
    );
    let json = check("list --dir f --json", &[]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 4);
    check(
        "revoke --dir f web1 --reason stolen",
        &[
            "revoked serial",
            "f/revoked.json",
            "version 1",
            "/etc/clamcast/revoked.json",
        ],
    );
    check(
        "revoke --dir f web1",
        &["revoked already", "(stolen)", "nothing was changed"],
    );
    check(
        "init --dir f --fleet bank --force",
        &["f/replaced-", "every host"],
    );
    check("--version", &["clamcast-certs "]);
}

#[test]
fn a_result_that_cannot_be_written_is_told_with_what_was_done_all_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let check = |line: &str, done: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_clamcast-certs"))
            .args(line.split_whitespace())
            .current_dir(scratch.path())
            .stdout(fs::File::create("/dev/full").unwrap())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(5), "{line}: {said}");
        assert!(
            said.contains(done) && said.contains("cannot write to stdout"),
            "{said}"
        );
    };
    check("init --dir f --fleet bank", "the fleet was made");
    check("master --dir f --host mirror", "the certificate was issued");
    check("agent --dir f web1", "the certificate was issued");
    check("list --dir f", "");
    check("revoke --dir f web1", "it was revoked");
    assert!(scratch.path().join("f/revoked.json").exists());
}

#[test]
fn exit_codes_say_whose_fault_it_was() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    check(dir, "list --dir f", 2, &["holds no fleet"]);
    check(dir, "init --dir f --fleet a/b", 2, &["not a fleet name"]);
    check(dir, "init --dir f --fleet bank", 0, &[]);
    check(dir, "init --dir f --fleet bank", 2, &["--force"]);
    check(dir, "agent --dir f web1", 2, &["clamcast-certs master"]);
    check(dir, "master --dir f", 2, &["--host"]);
    check(
        dir,
        "master --dir f --host mirror:7310",
        2,
        &["without a port"],
    );
    check(dir, "master --dir f --host mirror", 0, &[]);
    check(dir, "agent --dir f ../web1", 2, &["not an agent name"]);
    check(
        dir,
        "agent --dir f web1 --group *",
        2,
        &["not a group name"],
    );
    check(dir, "agent --dir f web1", 0, &[]);
    check(dir, "agent --dir f web1", 2, &["--force"]);
    check(dir, "revoke --dir f web2", 2, &["did you mean `web1`?"]);
    check(dir, "rotate-ca --dir f", 2, &["unrecognized"]);
    check(dir, "revoke --dir f web1", 0, &[]);

    check(dir, "init --dir other --fleet bank", 0, &[]);
    fs::copy(dir.join("f/revoked.json"), dir.join("other/revoked.json")).unwrap();
    check(
        dir,
        "list --dir other",
        4,
        &["not the list that this CA signed"],
    );
    fs::write(dir.join("f/ca.pem"), "").unwrap();
    check(dir, "list --dir f", 5, &["f/ca.pem is damaged"]);
    fs::write(dir.join("file"), "").unwrap();
    check(
        dir,
        "init --dir file --fleet bank",
        5,
        &["cannot write file"],
    );
}
