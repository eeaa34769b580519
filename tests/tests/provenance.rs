//! Whether a database is genuine and whole, by real databases and the word of the real sigtool.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::RSA_PSS_SHA256;
use clamcast_master::publish::check::sign_file::{Certificates, SignFileError, verify};
use clamcast_proto::container::{self, HEADER_BYTES};
use clamcast_proto::dsse::{Envelope, sign};
use clamcast_proto::manifest::{Manifest, SignedBy};
use clamcast_proto::names::DatabaseKind;
use clamcast_tests::lab::{
    Dismantled, Fleet, Master, Mirror, PATIENCE, Part, Scratch, Update, certificates_in, until,
};
use clamcast_tests::require;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey as _;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use md5::{Digest as _, Md5};
use serde_json::json;

/// Why we refuse a database, or `Ok`.
fn ours(name: &str, bytes: &[u8]) -> Result<(), String> {
    let kind = match name.rsplit_once('.') {
        Some((_, "cvd")) => DatabaseKind::Cvd,
        _ => DatabaseKind::Cld,
    };
    match container::check(kind, bytes) {
        Ok(summary) if summary.signed_by == SignedBy::Talos && summary.oddity.is_none() => Ok(()),
        Ok(summary) => Err(format!("{summary:?}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether sigtool accepts a database.
fn sigtool(path: &Path) -> bool {
    let mut option = std::ffi::OsString::from("--info=");
    option.push(path);
    let ran = Command::new(Part::Sigtool.path()).arg(option).output();
    ran.unwrap().status.success()
}

/// Every real database: those that Talos made, and each `.cld` that freshclam makes from them.
fn real_databases() -> Vec<(String, Vec<u8>)> {
    let mut databases = Vec::new();
    for entry in fs::read_dir(Part::TestFiles.path()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with(".cvd") {
            databases.push((name, fs::read(entry.path()).unwrap()));
        }
    }
    assert_eq!(databases.len(), 7);
    let mirror = Mirror::new();
    for version in 2..=6 {
        let cld = fs::read(mirror.freshclam_to(version)).unwrap();
        databases.push((format!("test-{version}.cld"), cld));
    }
    databases
}

#[test]
fn every_real_database_is_signed_by_talos() {
    require!(Freshclam, Sigtool, TestFiles);
    let scratch = Scratch::new();
    for (name, bytes) in real_databases() {
        let path = scratch.join(&name);
        fs::write(&path, &bytes).unwrap();
        assert!(sigtool(&path), "{name}");
        assert_eq!(ours(&name, &bytes), Ok(()), "{name}");
    }
}

#[test]
fn what_sigtool_refuses_after_a_changed_byte_is_refused() {
    require!(Freshclam, Sigtool, TestFiles);
    let scratch = Scratch::new();
    let (mut refused, mut stricter) = (0, 0);
    for (name, bytes) in real_databases() {
        // Alone in its directory: sigtool also looks at a .cvd beside a .cld.
        let path = scratch.directory(&name).join(&name);
        // Every field of the header, and of the rest enough to meet every member.
        let text = bytes[..HEADER_BYTES].trim_ascii_end().len();
        let header = (0..text).step_by(1 + text / 100);
        let body = (HEADER_BYTES..bytes.len()).step_by(1 + bytes.len() / 100);
        for at in header.chain(body) {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            match (sigtool(&path), ours(&name, &changed)) {
                (false, Ok(())) => panic!("{name}: byte {at} is wrong, and only sigtool saw it"),
                (false, Err(_)) => refused += 1,
                (true, Err(_)) => stricter += 1,
                // Nothing covers this text in a plain .cld.
                (true, Ok(())) => assert!(is_licence(&bytes, at), "{name}: byte {at}"),
            }
        }
    }
    println!("{refused} refused by both, {stricter} only by clamcast");
    assert!(refused > 500 && stricter > 20, "{refused}, {stricter}");
}

#[test]
fn what_sigtool_refuses_after_a_change_of_the_structure_is_refused() {
    require!(Freshclam, Sigtool, TestFiles);
    let scratch = Scratch::new();
    let mirror = Mirror::new();
    mirror.freshclam_to(5);
    let genuine = fs::read(mirror.freshclam_to(6)).unwrap();
    type Change = fn(&mut Dismantled);
    let changes: &[(&str, Change)] = &[
        ("nothing", |_| {}),
        ("no newline after the signature", |cld| {
            cld.info(|info| info.trim_end().to_owned());
        }),
        ("two newlines after the signature", |cld| {
            cld.info(|info| info + "\n")
        }),
        ("a line after the signature", |cld| {
            cld.info(|info| info + "test.cfg:0:00\n");
        }),
        ("two signatures", |cld| {
            cld.info(|info| info.replace("DSIG:", "DSIG:a\nDSIG:"));
        }),
        ("a longer signature", |cld| {
            cld.info(|info| info.replace("DSIG:", "DSIG:a"))
        }),
        ("a lower-case prefix", |cld| {
            cld.info(|info| info.replace("DSIG:", "dsig:"))
        }),
        ("spaces in the first line", |cld| {
            cld.info(|info| info.replacen('\n', "  \n", 1));
        }),
        ("no .info", |cld| {
            cld.members.retain(|(name, _)| !name.ends_with(".info"))
        }),
        ("no licence", |cld| {
            cld.members.retain(|(name, _)| name != "COPYING")
        }),
        ("a member less", |cld| drop(cld.members.pop())),
        ("a member twice", |cld| {
            cld.members.push(cld.members[3].clone())
        }),
        ("a member more", |cld| {
            cld.members.push(("test.ign2".into(), b"Eicar\n".to_vec()));
        }),
        ("an empty member more", |cld| {
            cld.members.push(("test.pad".into(), Vec::new()))
        }),
        ("members swapped", |cld| cld.members.swap(3, 4)),
        ("members in reverse", |cld| cld.members.reverse()),
        ("a longer member", |cld| cld.member(".hdb").push(b'\n')),
        ("an empty member", |cld| cld.member(".hdb").clear()),
        ("another version", |cld| {
            cld.header = replaced(&cld.header, ":6:", ":7:")
        }),
        ("another count", |cld| {
            cld.header = replaced(&cld.header, ":14:", ":13:")
        }),
        ("another builder", |cld| {
            cld.header = replaced(&cld.header, "micasnyd", "micasnye")
        }),
    ];
    let mut accepted = Vec::new();
    for (what, change) in changes {
        let mut cld = Dismantled::new(&genuine);
        change(&mut cld);
        let bytes = cld.bytes();
        let path = scratch.join("test.cld");
        fs::write(&path, &bytes).unwrap();
        let ours = ours("test.cld", &bytes);
        if ours.is_ok() {
            assert!(sigtool(&path), "only sigtool refuses: {what}");
            accepted.push(*what);
        }
    }
    let harmless = [
        "nothing",
        "no licence",
        "members swapped",
        "members in reverse",
    ];
    assert_eq!(accepted, harmless);
}

fn replaced(header: &[u8], from: &str, to: &str) -> Vec<u8> {
    let header = String::from_utf8(header.to_vec()).unwrap();
    header.replacen(from, to, 1).into_bytes()
}

/// Whether a byte belongs to the text of COPYING, the first member of a plain tar.
fn is_licence(bytes: &[u8], at: usize) -> bool {
    let content = HEADER_BYTES + 512;
    let end = Dismantled::new(bytes).member("COPYING").len() + content;
    (content..end).contains(&at)
}

/// A fleet whose master published version 5 of a database that Talos signed, and loads nothing itself.
/// It publishes no unsigned databases.
struct Lab {
    fleet: Fleet,
    master: Master,
    /// Version 6 as freshclam makes it.
    genuine: Vec<u8>,
}

impl Lab {
    fn new() -> Self {
        let fleet = Fleet::new();
        let upstream = Mirror::new();
        let first = fs::read(upstream.freshclam_to(5)).unwrap();
        let genuine = fs::read(upstream.freshclam_to(6)).unwrap();
        fs::write(fleet.mirror().join("test.cld"), first).unwrap();
        let mut master = fleet.master(&fleet.mirror());
        master.configure(
            "require = []",
            "require = []\nload_test = \"never\"\nunsigned = \"refuse\"",
        );
        master.start();
        master.wait_generation(1);
        Self {
            fleet,
            master,
            genuine,
        }
    }

    /// Puts a database into the mirror; the master must refuse it with this in its reason.
    fn refuses(&self, name: &str, bytes: &[u8], because: &str) {
        let mirror = self.fleet.mirror();
        fs::write(mirror.join(".part"), bytes).unwrap();
        fs::rename(mirror.join(".part"), mirror.join(name)).unwrap();
        let ran = self.master.command(&["publish"]);
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(4), "{said}");
        assert!(said.contains(name) && said.contains(because), "{said}");
        let status = self.master.json(&["status"]).unwrap();
        let reason = status["held"][0]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains(because), "{status}");
        assert_eq!(status["generation"], 1);
    }
}

/// A signature by a key that is not Talos's, in ClamAV's encoding.
fn signed_by_another(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/";
    let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
    let mut signature = vec![u8::MAX; pair.public_modulus_len()];
    // Until it is below Talos's modulus: every signature has another salt.
    while signature[0] > 0x50 {
        pair.sign(
            &RSA_PSS_SHA256,
            &SystemRandom::new(),
            text.as_bytes(),
            &mut signature,
        )
        .unwrap();
    }
    signature.reverse();
    let bit = |at: usize| signature.get(at / 8).map_or(0, |byte| byte >> (at % 8) & 1);
    let digits = (0..signature.len() * 8).step_by(6).map(|place| {
        let digit = (0..6).fold(0, |digit, low| digit | bit(place + low) << low);
        DIGITS[usize::from(digit)] as char
    });
    digits.collect()
}

#[test]
fn a_forged_cut_or_newly_signed_cld_is_refused_without_a_load_test() {
    require!(Freshclam, TestFiles);
    let lab = Lab::new();
    let genuine = || Dismantled::new(&lab.genuine);

    let mut changed = genuine();
    changed.member(".hdb").extend(b"# a line more\n");
    lab.refuses("test.cld", &changed.bytes(), "`.info` says");

    let mut forged = genuine();
    forged.add(".hdb", "44d88612fea8a8f36de82e1278abb02f:68:Lab.Forged\n");
    let unknown = "the signature in `.info` is by an unknown signer";
    lab.refuses("test.cld", &forged.bytes(), unknown);

    let signed = |info: String| info.split("DSIG:").next().unwrap().to_owned();
    let mut resigned = forged.clone();
    resigned.info(|info| {
        let signed = signed(info);
        format!("{signed}DSIG:{}\n", signed_by_another(&signed))
    });
    lab.refuses("test.cld", &resigned.bytes(), unknown);

    let mut scheme = forged.clone();
    scheme.info(|info| format!("{}DSIG:pkcs7-MIIB\n", signed(info)));
    let kind = "the signature in `.info` is of an unknown kind";
    lab.refuses("test.cld", &scheme.bytes(), kind);

    let mut unsigned = forged;
    unsigned.info(signed);
    lab.refuses(
        "test.cld",
        &unsigned.bytes(),
        "`.info` has no signature, and clamd refuses",
    );

    let mut newer = genuine();
    newer.header = replaced(&newer.header, ":6:", ":7:");
    lab.refuses(
        "test.cld",
        &newer.bytes(),
        "the version is `7` in the header",
    );
    newer.info(|info| info.replacen(":6:", ":7:", 1));
    lab.refuses("test.cld", &newer.bytes(), unknown);

    let mut without_last = genuine();
    without_last.members.pop();
    lab.refuses("test.cld", &without_last.bytes(), "which is not there");
    let cut = &lab.genuine[..lab.genuine.len() - 100];
    lab.refuses("test.cld", cut, "it was cut off");
    let longer = [&lab.genuine[..], &[0; 22 * 512]].concat();
    lab.refuses("test.cld", &longer, "something follows the end of the tar");

    fs::write(lab.fleet.mirror().join("test.cld"), &lab.genuine).unwrap();
    lab.master.wait_generation(2);
    let generations = lab.master.json(&["generations"]).unwrap();
    assert_eq!(generations[1]["files"][0]["signed_by"], json!("talos"));
}

#[test]
fn a_cvd_with_another_body_is_refused_without_a_load_test() {
    require!(Freshclam, TestFiles);
    let lab = Lab::new();
    fs::remove_file(lab.fleet.mirror().join("test.cld")).unwrap();
    let real = |version| {
        let path = Part::TestFiles.path().join(format!("test-{version}.cvd"));
        fs::read(path).unwrap()
    };
    let (five, six) = (real(5), real(6));

    let swapped = [&six[..HEADER_BYTES], &five[HEADER_BYTES..]].concat();
    let differs = "the build time is `22 Jun 2021 21-34 -0400` in the header, and";
    lab.refuses("test.cvd", &swapped, differs);

    // The same content, compressed anew: only the MD5 is another.
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut GzDecoder::new(&six[HEADER_BYTES..]), &mut tar).unwrap();
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&tar).unwrap();
    let body = encoder.finish().unwrap();
    let compressed = [&six[..HEADER_BYTES], &body].concat();
    lab.refuses("test.cvd", &compressed, "the body has MD5");

    let header = String::from_utf8(six[..HEADER_BYTES].to_vec()).unwrap();
    let fields: Vec<&str> = header.split(':').collect();
    let md5 = hex::encode(Md5::digest(&body));
    let named = header.replace(fields[5], &md5);
    let named = [named.as_bytes(), &body].concat();
    let unknown = "the signature in the header is by an unknown signer";
    lab.refuses("test.cvd", &named, unknown);

    let signature = Part::TestFiles.path().join("test-6.cvd.sign");
    let signature = fs::read(signature).unwrap();
    let update = Update::begin(lab.fleet.mirror());
    update.put("test.cvd", six);
    update.put("test-6.cvd.sign", signature);
    drop(update);
    lab.master.wait_generation(2);
    let files = &lab.master.json(&["generations"]).unwrap()[1]["files"];
    assert_eq!(
        (&files[0]["name"], &files[0]["signed_by"]),
        (&json!("test.cvd"), &json!("talos"))
    );
    // Nobody can verify the signature file.
    assert_eq!(files[1], json!(null));
    let skipped = &lab.master.json(&["status"]).unwrap()["skipped"][0];
    assert_eq!(skipped["name"], "test-6.cvd.sign");
}

#[test]
fn an_official_database_under_the_name_of_another_is_refused() {
    require!(Freshclam, TestFiles);
    let lab = Lab::new();
    let bytecode = fs::read(Part::TestFiles.path().join("bytecode.cvd")).unwrap();
    let name = "main.cvd is the database bytecode under another name";
    lab.refuses("main.cvd", &bytecode, name);
    fs::rename(
        lab.fleet.mirror().join("main.cvd"),
        lab.fleet.mirror().join("bytecode.cvd"),
    )
    .unwrap();
    lab.master.wait_generation(2);
}

#[test]
fn a_signed_database_that_is_gone_is_held_until_an_operator_accepts_it() {
    require!(Freshclam, TestFiles);
    let lab = Lab::new();
    let mirror = lab.fleet.mirror();
    let bytecode = fs::read(Part::TestFiles.path().join("bytecode.cvd")).unwrap();
    fs::write(mirror.join("bytecode.cvd"), bytecode).unwrap();
    lab.master.wait_generation(2);
    fs::remove_file(mirror.join("bytecode.cvd")).unwrap();
    let held = lab.master.command(&["publish"]);
    let said = String::from_utf8_lossy(&held.stderr);
    assert!(
        said.contains("bytecode.cvd is published and no longer in the mirror"),
        "{said}"
    );
    let accepted = lab
        .master
        .command(&["publish", "--accept", "it was withdrawn"]);
    assert!(accepted.status.success(), "{accepted:?}");
    lab.master.wait_generation(3);
}

#[test]
fn operators_hosts_and_receipts_show_which_databases_talos_signed() {
    require!(Freshclam, TestFiles);
    let Lab {
        fleet, mut master, ..
    } = Lab::new();
    master.stop();
    master.configure("unsigned = \"refuse\"", "unsigned = \"allow\"");
    master.start();
    let local = "Lab.Local:0:*:6c6f63616c\n";
    fs::write(fleet.mirror().join("local.ndb"), local).unwrap();
    master.wait_generation(2);
    let mut agent = fleet.agent("web1");
    agent.start();
    master.wait_live("web1", 2);

    let shown = master.command(&["generations"]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(
        shown.contains("local.ndb (unsigned), test.cld:5"),
        "{shown}"
    );
    let status = until(PATIENCE, "the agent knows", || {
        let status = agent.json(&["status"]).unwrap();
        if status["generation"] == json!(2) {
            Ok(status)
        } else {
            Err(status)
        }
    });
    assert_eq!(status["unsigned"], json!(["local.ndb"]));
    let status = agent.command(&["status"]);
    let status = String::from_utf8(status.stdout).unwrap();
    let line = status.lines().find(|line| line.contains("unsigned:"));
    assert!(line.unwrap_or_default().contains("local.ndb"), "{status}");

    let receipts = master.wait_audit("receipt", 1);
    let last = receipts.last().unwrap();
    let receipt = receipt(last);
    let generations = master.json(&["generations"]).unwrap();
    let generation = generations.as_array().unwrap().last().unwrap();
    let content = &master.json(&["status"]).unwrap()["content"];
    assert_eq!(
        receipt["content"], *content,
        "the host has what was published"
    );
    assert_eq!(generation["files"][1]["name"], "test.cld", "{generation}");
    assert_eq!(generation["files"][1]["signed_by"], "talos", "{generation}");
}

/// The newest generation as an earlier build signed it: nobody has verified a database.
fn unverify(fleet: &Fleet, master: &Master, generation: u64) {
    let path = master
        .directory()
        .join(format!("state/generations/1-{generation}.json"));
    let envelope: Envelope = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut manifest: Manifest = serde_json::from_slice(&envelope.payload).unwrap();
    for file in &mut manifest.files {
        file.container.as_mut().unwrap().signed_by = None;
    }
    let key = fs::read_to_string(fleet.pki().join("manifest.key")).unwrap();
    let key = SigningKey::from_pkcs8_pem(&key).unwrap();
    let envelope = sign(manifest, &key).envelope().clone();
    fs::write(path, serde_json::to_vec(&envelope).unwrap()).unwrap();
}

#[test]
fn a_generation_of_an_earlier_build_is_verified_and_published_once_more() {
    require!(Freshclam, TestFiles);
    let Lab {
        fleet, mut master, ..
    } = Lab::new();
    master.stop();
    unverify(&fleet, &master, 1);
    master.start();
    master.wait_generation(2);
    let generations = master.json(&["generations"]).unwrap();
    assert_eq!(generations[0]["files"][0]["signed_by"], json!(null));
    assert_eq!(generations[1]["files"][0]["signed_by"], json!("talos"));
    let published = master.command(&["publish"]);
    let said = String::from_utf8_lossy(&published.stdout);
    assert!(said.contains("unchanged"), "{said}");
}

/// What a receipt in the audit log says.
fn receipt(record: &serde_json::Value) -> serde_json::Value {
    let envelope = record["detail"]["receipt"].clone();
    let envelope: Envelope = serde_json::from_value(envelope).unwrap();
    serde_json::from_slice(&envelope.payload).unwrap()
}

#[test]
fn a_signature_file_of_clamav_verifies_once_its_issuer_is_trusted() {
    require!(TestFiles);
    let scratch = Scratch::new();
    let files = Part::TestFiles.path();
    let sign = |version: u32| fs::read(files.join(format!("test-{version}.cvd.sign"))).unwrap();
    let cvd = |version: u32| File::open(files.join(format!("test-{version}.cvd"))).unwrap();
    let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();

    // Any root but theirs, which the test files lack.
    let certs = scratch.directory("certs");
    let key = rcgen::KeyPair::generate().unwrap();
    let parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    let other = parameters.self_signed(&key).unwrap();
    fs::write(certs.join("other.crt"), other.pem()).unwrap();
    let certificates = Certificates::load(&certs).unwrap();
    for version in 1..=6 {
        let error = verify(&sign(version), cvd(version), &certificates, now).unwrap_err();
        let error = error.to_string();
        let expected = "no certificate of the directory vouches for it";
        assert!(error.starts_with(expected), "{error}");
    }

    // The signature comes with the certificate of the signer's issuer.
    fs::write(certs.join("issuer.pem"), certificates_in(&sign(1))).unwrap();
    let certificates = Certificates::load(&certs).unwrap();
    for version in 1..=6 {
        verify(&sign(version), cvd(version), &certificates, now).unwrap();
        let other = version % 6 + 1;
        let error = verify(&sign(version), cvd(other), &certificates, now).unwrap_err();
        assert!(matches!(error, SignFileError::Content), "{error}");
    }
    let later = "2036-01-01T00:00:00Z".parse().unwrap();
    let error = verify(&sign(1), cvd(1), &certificates, later).unwrap_err();
    assert!(
        matches!(error, SignFileError::Certificate { .. }),
        "{error}"
    );
}
