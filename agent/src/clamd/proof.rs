//! What the proof of an install is made of: a sample, the signature that names it, and the gate.
//!
//! Pure: numbers and the host's nonce come in, names and file contents go out.
//!
//! An install has a number N that no earlier install on this host had. The canary file holds one
//! signature, of a sample that belongs to N, under the name `Clamcast.Install-N`; the gate file,
//! which clamd loads before everything else, hides the names of the installs after N. The databases
//! are renamed into place first, then the canary, then the gate. A clamd that finds the sample under
//! the name N therefore read the gate of N, or an older one that did not reach as far as N, and so
//! opened every database after it was renamed. A canary alone can lie: it may have been opened by a
//! load that had opened the databases before they were renamed.

use std::fmt::Write as _;

use clamcast_proto::receipt::InstallNumber;
use sha2::{Digest as _, Sha256};

/// File name of the signature of the current install. `.hsb` because a SHA-256 is allowed where
/// FIPS limits forbid MD5.
pub const CANARY: &str = "clamcast-canary.hsb";

/// File name of the list of names that are hidden. `.ign2` files are loaded before everything else
/// (libclamav/readdb.c, `cli_loaddbdir`).
pub const GATE: &str = "clamcast-gate.ign2";

/// So many installs after N are hidden by the gate of N: some may be given up after their canary
/// was renamed and before their gate was.
pub const GATE_SPAN: u64 = 16;

/// Canary and gate files are smaller than this many bytes; anything larger is not ours, and not
/// read.
pub const PROOF_FILE_BYTES_MAX: u64 = 4 << 10;

const NAME: &str = "Clamcast.Install-";

/// Random, made once a host, kept in the agent's state. It keeps the samples of a host unknown, so
/// that nobody fills logs with hits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Nonce(pub [u8; 16]);

/// What clamd is asked to scan after install `n`. Every install has another sample, so that the
/// engine before says OK to it and an install is one hit in clamd's log.
pub fn sample(nonce: &Nonce, n: InstallNumber) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(b"clamcast");
    hasher.update(nonce.0);
    hasher.update(n.0.to_be_bytes());
    hasher.finalize().into()
}

/// Content of [`CANARY`]: `SHA256:LENGTH:NAME:FLEVEL`, where functionality level 73 is the first
/// one whose engine reads SHA-256 (as ClamAV's manual of hash signatures has it).
pub fn canary(nonce: &Nonce, n: InstallNumber) -> String {
    let sample = sample(nonce, n);
    let digest = hex::encode(Sha256::digest(sample));
    format!("{digest}:{}:{NAME}{n}:73\n", sample.len())
}

/// Content of [`GATE`]: the names of the [`GATE_SPAN`] installs after `n`.
pub fn gate(n: InstallNumber) -> String {
    let mut text = String::new();
    for hidden in n.0 + 1..=n.0 + GATE_SPAN {
        writeln!(text, "{NAME}{hidden}").expect("a string takes everything");
    }
    text
}

/// The install whose canary this is, if it is one.
pub fn canary_number(text: &str) -> Option<InstallNumber> {
    let [digest, length, name, level] = text.trim_end().split(':').collect::<Vec<_>>()[..] else {
        return None;
    };
    let whole = digest.len() == 64 && length == "32" && level == "73";
    whole.then(|| number(name))?
}

/// The install whose gate this is, if it is a whole one.
pub fn gate_number(text: &str) -> Option<InstallNumber> {
    let first_hidden = number(text.lines().next()?)?;
    let n = InstallNumber(first_hidden.0.checked_sub(1)?);
    (n.0.checked_add(GATE_SPAN)? < u64::MAX && text == gate(n)).then_some(n)
}

/// The install that clamd names when it finds a sample: `Clamcast.Install-7.UNOFFICIAL`.
pub(super) fn found_number(name: &str) -> Option<InstallNumber> {
    number(name.strip_suffix(".UNOFFICIAL").unwrap_or(name))
}

/// Only as we write it: a number with a sign or leading zeros is somebody else's.
fn number(name: &str) -> Option<InstallNumber> {
    let digits = name.strip_prefix(NAME)?;
    let n = digits.parse().ok()?;
    (digits == u64::to_string(&n)).then_some(InstallNumber(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: Nonce = Nonce([7; 16]);

    #[test]
    fn canary_and_gate_say_whose_they_are() {
        for n in [0, 1, 2, 16, 17, 1 << 40].map(InstallNumber) {
            assert_eq!(canary_number(&canary(&NONCE, n)), Some(n));
            assert_eq!(gate_number(&gate(n)), Some(n));
        }
    }

    #[test]
    fn damaged_files_are_nobodys() {
        let canary = canary(&NONCE, InstallNumber(7));
        let gate = gate(InstallNumber(7));
        for damaged in [
            "",
            "\n",
            "Clamcast.Install-x\n",
            "Clamcast.Install-0\n",
            "Clamcast.Install-18446744073709551615\n",
            "Clamcast.Install-18446744073709551600\n",
            &canary[1..],
            &canary[..canary.len() - 2],
            &gate[..gate.len() - 1],
            &gate[1..],
        ] {
            assert_eq!(canary_number(damaged), None, "{damaged:?}");
            assert_eq!(gate_number(damaged), None, "{damaged:?}");
        }
    }

    #[test]
    fn a_gate_hides_the_next_sixteen() {
        let hidden: Vec<_> = gate(InstallNumber(2))
            .lines()
            .filter_map(found_number)
            .collect();
        assert_eq!(hidden, (3..=18).map(InstallNumber).collect::<Vec<_>>());
    }

    #[test]
    fn samples_differ_by_install_and_by_host() {
        let (one, two) = (InstallNumber(1), InstallNumber(2));
        assert_ne!(sample(&NONCE, one), sample(&NONCE, two));
        assert_ne!(sample(&NONCE, one), sample(&Nonce([8; 16]), one));
    }

    #[test]
    fn a_found_name_is_read_with_and_without_its_ending() {
        assert_eq!(
            found_number("Clamcast.Install-7.UNOFFICIAL"),
            Some(InstallNumber(7))
        );
        assert_eq!(found_number("Clamcast.Install-7"), Some(InstallNumber(7)));
        assert_eq!(found_number("Clamcast.Install-07.UNOFFICIAL"), None);
        assert_eq!(found_number("Eicar-Test-Signature"), None);
    }
}
