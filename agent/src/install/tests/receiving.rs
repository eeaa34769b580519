//! What comes over the wire, and what does not.

use super::*;

#[test]
fn what_does_not_fit_is_said_before_it_is_transferred() {
    let host = Host::with(1, "daily.cld@1=one");
    let mut huge = manifest(2, "daily.cld@2=two");
    let mut files = huge.files.clone();
    files[0].size = u64::from(u32::MAX) << 20; // a promise, not a file
    huge = clamcast_proto::dsse::sign(
        Manifest {
            files,
            ..Manifest::clone(&huge)
        },
        &ed25519_dalek::SigningKey::from_bytes(&[7; 32]),
    );
    let fault = plan(&host.start(), &huge, false).unwrap_err();
    assert!(matches!(fault, HostFault::Space { .. }), "{fault}");
    let completed = block_on(host.start().host_fault(&huge, &fault));
    assert_eq!(completed.outcome, Outcome::HostFault);
    assert!(completed.error.unwrap().contains("bytes free"));
}

#[test]
fn a_full_disk_while_receiving_is_a_host_fault_with_path_and_reason() {
    let host = Host::with(1, "daily.cld@1=one");
    let shim = host.shim(Fault::None);
    let (installer, _) = host.start_on(shim.clone()).unwrap();
    let offer = manifest(2, "daily.cld@2=two");
    plan(&installer, &offer, false).unwrap();
    shim.set_fault(Fault::From(0, Errno::ENOSPC));
    let file = &offer.files[0];
    let error = installer
        .receive(&full(file), file, &b"two"[..])
        .unwrap_err();
    let text = crate::chain(&error);
    assert!(
        text.contains("stage") && text.contains("No space left"),
        "{text}"
    );
    assert_eq!(host.there(), set("daily.cld=one"));
}

/// Sends the part of an encoding from `offset` on.
fn send(
    installer: &lab::FakeInstaller,
    file: &ManifestFile,
    encoding: &PartEncoding,
    offset: usize,
    bytes: &[u8],
) -> Result<(), ReceiveError> {
    let part = Part {
        encoding: encoding.clone(),
        offset: offset as u64,
        ..full(file)
    };
    installer.receive(&part, file, bytes)
}

/// A file that is large enough to cut, with one record that changes.
fn large(day: u32) -> String {
    let record = |n| format!("record-{n}-{}|", if n == 2500 { day } else { 0 });
    (0..5000).map(record).collect()
}

#[test]
fn a_delta_and_a_compressed_file_come_out_as_the_file_in_any_pieces() {
    let (old, new) = (large(1), large(2));
    let old_line = format!("daily.cld@1={old}");
    let offer = manifest(2, &format!("daily.cld@2={new}"));
    let file = &offer.files[0];
    let from = Digest::of(old.as_bytes());
    let input = |digest, bytes| delta::Input { digest, bytes };
    let (base, target) = (
        input(from, old.as_bytes()),
        input(file.sha256, new.as_bytes()),
    );
    let mut delta = Vec::new();
    delta::make(base, target, &mut delta).unwrap();
    let zstd = zstd::bulk::compress(new.as_bytes(), 1).unwrap();
    let encoding = |kind, zstd, from, length: usize| PartEncoding {
        kind,
        zstd,
        from,
        to: file.sha256,
        length: length as u64,
    };
    for (encoding, bytes) in [
        (
            encoding(PartKind::Delta, false, Some(from), delta.len()),
            &delta[..],
        ),
        (encoding(PartKind::Full, true, None, zstd.len()), &zstd),
        (
            encoding(PartKind::Full, false, None, new.len()),
            new.as_bytes(),
        ),
    ] {
        for cut in [1, bytes.len() / 2, bytes.len() - 1] {
            let host = Host::with(1, &old_line);
            let installer = host.start();
            let needs = plan(&installer, &offer, false).unwrap();
            assert_eq!(needs[0].have, Have::Sha256(from));
            let cut_off = send(&installer, file, &encoding, 0, &bytes[..cut]).unwrap_err();
            assert!(
                matches!(cut_off, ReceiveError::Interrupted { .. }),
                "{cut_off}"
            );
            drop(installer);
            let installer = host.start(); // a restart in between
            let needs = plan(&installer, &offer, false).unwrap();
            assert_eq!(
                (needs[0].resume_at, needs[0].resume.as_ref()),
                (cut as u64, Some(&encoding))
            );
            send(&installer, file, &encoding, cut, &bytes[cut..]).unwrap();
            assert_eq!(plan(&installer, &offer, false).unwrap(), []);
            let completed = host.install(&installer, &offer);
            assert_eq!(completed.outcome, Outcome::Live, "{:?}", completed.error);
            assert_eq!(host.there()["daily.cld"], new);
        }
        // Damage is thrown away, and the next plan starts from nothing.
        let host = Host::with(1, &old_line);
        let installer = host.start();
        plan(&installer, &offer, false).unwrap();
        let mut damaged = bytes.to_vec();
        let at = damaged.len() - 9;
        damaged[at] ^= 1;
        let error = send(&installer, file, &encoding, 0, &damaged).unwrap_err();
        assert!(matches!(error, ReceiveError::Damaged { .. }), "{error}");
        assert_eq!(plan(&installer, &offer, false).unwrap()[0].resume_at, 0);
        assert_eq!(host.there()["daily.cld"], old);
    }
}

#[test]
fn a_part_that_was_not_asked_for_is_refused_before_it_is_read() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let offer = manifest(2, "daily.cld@2=two");
    let file = &offer.files[0];
    let good = full(file).encoding;
    for bad in [
        PartEncoding {
            to: Digest::of(b"x"),
            ..good.clone()
        },
        PartEncoding {
            length: 4,
            ..good.clone()
        },
        PartEncoding {
            length: u64::MAX,
            zstd: true,
            ..good.clone()
        },
        PartEncoding {
            kind: PartKind::Signature,
            ..good.clone()
        },
        PartEncoding {
            from: Some(Digest::of(b"x")),
            ..good.clone()
        },
        PartEncoding {
            kind: PartKind::Delta,
            from: Some(Digest::of(b"x")),
            ..good.clone()
        },
        PartEncoding {
            kind: PartKind::Delta,
            ..good.clone()
        },
    ] {
        let error = send(&installer, file, &bad, 0, b"two").unwrap_err();
        assert!(
            matches!(error, ReceiveError::Unexpected { .. }),
            "{bad:?}: {error}"
        );
    }
    let error = send(&installer, file, &good, 2, b"o").unwrap_err();
    assert!(matches!(error, ReceiveError::Unexpected { .. }), "{error}");
}

#[test]
fn a_bomb_ends_at_the_length_of_the_file() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let offer = manifest(2, "daily.cld@2=two");
    let file = &offer.files[0];
    let bomb = zstd::bulk::compress(&vec![0; 8 << 20], 1).unwrap();
    let encoding = PartEncoding {
        zstd: true,
        length: bomb.len() as u64,
        ..full(file).encoding
    };
    let error = send(&installer, file, &encoding, 0, &bomb).unwrap_err();
    assert!(error.to_string().contains("more than 3 bytes"), "{error}");
}

#[test]
fn stages_outlive_an_offer_that_supersedes_theirs_only_where_it_wants_them() {
    let host = Host::with(1, "daily.cld@1=one");
    let installer = host.start();
    let first = manifest(2, "daily.cld@2=two x.ndb=x");
    plan(&installer, &first, false).unwrap();
    for (file, content) in first.files.iter().zip(["two", "x"]) {
        installer
            .receive(&full(file), file, content.as_bytes())
            .unwrap();
    }
    let second = manifest(3, "daily.cld@3=three x.ndb=x");
    let needs = plan(&installer, &second, false).unwrap();
    assert_eq!(needs.len(), 1);
    assert_eq!(needs[0].name.as_str(), "daily.cld");
    let staged = fs::read_dir(host.hidden("stage")).unwrap().count();
    assert_eq!(staged, 1, "the file that nobody wants any more is gone");
}

#[test]
fn a_reader_never_sees_a_part_of_a_file() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let content = |generation: u64| format!("{generation}:").repeat(20_000);
    let line = |generation| format!("daily.cld@{generation}={}", content(generation));
    let host = Host::with(1, &line(1));
    let path = host.database().join("daily.cld");
    let stop = Arc::new(AtomicBool::new(false));
    let reader = std::thread::spawn({
        let stop = Arc::clone(&stop);
        move || {
            let mut looks = 0;
            while !stop.load(Ordering::Relaxed) {
                let text = fs::read_to_string(&path).unwrap();
                let (number, _) = text.split_once(':').unwrap();
                assert_eq!(text, format!("{number}:").repeat(20_000));
                looks += 1;
            }
            looks
        }
    });
    let installer = host.start();
    for generation in 2..=200 {
        let line = line(generation);
        let completed = host
            .take(&installer, &manifest(generation, &line), &line)
            .unwrap();
        assert_eq!(completed.outcome, Outcome::Live);
    }
    stop.store(true, Ordering::Relaxed);
    assert!(reader.join().unwrap() > 0);
}
