//! Talos's signatures of ClamAV's databases.
//!
//! A `.cvd` has two signatures. The `DSIG:` line of `.info` signs the header and the list of members
//! with RSASSA-PSS (RFC 8017): SHA-256, MGF1 with SHA-256, a salt of 32 bytes. The header has an RSA
//! signature of the body's MD5 without padding. The product of two such signatures is a signature again,
//! so this one proves little by itself. A `.cld` has only the `DSIG:` line, because freshclam writes its
//! body.
//!
//! The schemes are those of `cli_versig2` and `cli_versig` in libclamav/dsig.c.
//!
//! PSS is our own code because Talos's signatures break a rule that crates enforce: the modulus has 2047
//! bits, and the signatures are encoded for a modulus of 2048 bits. About a quarter of them have a bit
//! set that must be zero by RFC 8017.

use num_bigint::BigUint;
use sha2::{Digest as _, Sha256};

/// A signature of Talos is missing or does not verify.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SignatureError {
    /// The signature is missing.
    #[error("{0} has no signature, and clamd refuses a .cvd or .cld without one")]
    Missing(Place),
    /// The text is not a number in ClamAV's digits, or the number exceeds the modulus.
    #[error(
        "the signature in {0} is of an unknown kind: it was changed, or Talos signs in a new way"
    )]
    UnknownScheme(Place),
    /// The signature does not verify with the known key.
    #[error(
        "the signature in {0} is by an unknown signer: the database was changed or forged, or \
         Talos has a new key"
    )]
    UnknownSigner(Place),
}

/// Where a signature stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// The `DSIG:` line of `.info`.
    Info,
    /// The seventh field of the header.
    Header,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Info => "`.info`",
            Self::Header => "the header",
        })
    }
}

/// Verifies the signature of the `DSIG:` line over what stands before it in `.info`: the header, and
/// the size and SHA-256 of every member but `COPYING`.
pub fn verify_info(signed: &str, signature: Option<&str>) -> Result<(), SignatureError> {
    let place = Place::Info;
    let encoded = Key::of_info().recover(signature, place)?;
    if !is_pss(&encoded, &Sha256::digest(signed)) {
        return Err(SignatureError::UnknownSigner(place));
    }
    Ok(())
}

/// Verifies the header's signature over the MD5 of a `.cvd`'s body. Nothing pads the signed number: it
/// is the MD5 itself.
pub fn verify_body(md5: &[u8; 16], signature: Option<&str>) -> Result<(), SignatureError> {
    let place = Place::Header;
    if Key::of_body().recover(signature, place)? != BigUint::from_bytes_be(md5) {
        return Err(SignatureError::UnknownSigner(place));
    }
    Ok(())
}

/// An RSA public key.
struct Key {
    modulus: BigUint,
    exponent: BigUint,
}

impl Key {
    /// The key of `DSIG:` lines: `INFO_NSTR` and `INFO_ESTR` in libclamav/readdb.c.
    fn of_info() -> Self {
        Self::new(
            "1108889498304854547365955610662719492392894179179504762059165869741358104332271591\
         2172496806525381055880964520618400224333320534660299233983755341740679502866829909\
         6799557343913926683783612215242053966310901051516412708572770803107343209516537005\
         0894171741916872394250789070290470270758745162169105075430785038339986534648720379\
         8464178537392211402786481359824461197231102895415093770394216666324484593935762408\
         4685168266331921408266679234948220458053478099328484548458869717064243605586678627\
         7587607205943770336538020910169773857751547693508546945527999411314597799408461832\
         8482151013142393373316337519977244732747977",
            100_002_049,
        )
    }

    /// The key of headers: `CLI_NSTR` and `CLI_ESTR` in libclamav/dsig.c.
    fn of_body() -> Self {
        Self::new(
            "1186409955516453426030700016584531897515277744120277437465994057432431426074641447\
         6736106064065584474976078889002228342492276248891756555100246777110966959818941043\
         4699034532232228621591089508178591428456220796841621637175567590476666928698770143\
         328137383952820383197532047771780196576957695822641224262693037",
            100_001_027,
        )
    }

    fn new(modulus: &str, exponent: u32) -> Self {
        let modulus = BigUint::parse_bytes(modulus.as_bytes(), 10);
        Self {
            modulus: modulus.expect("it consists of digits"),
            exponent: exponent.into(),
        }
    }

    /// The number that was signed (RSAVP1, RFC 8017, 5.2.2). A signature is a number below the modulus.
    fn recover(&self, signature: Option<&str>, place: Place) -> Result<BigUint, SignatureError> {
        let signature = signature.ok_or(SignatureError::Missing(place))?;
        let number = decode(signature).filter(|number| *number < self.modulus);
        let number = number.ok_or(SignatureError::UnknownScheme(place))?;
        Ok(number.modpow(&self.exponent, &self.modulus))
    }
}

/// Longest signature: 2048 bits in digits of six.
const DIGITS_MAX: usize = 2048usize.div_ceil(6);

/// Reads a number in ClamAV's digits: `a` to `z`, `A` to `Z`, `0` to `9`, `+` and `/` are 0 to 63, the
/// least significant first (`cli_decodesig` in libclamav/dsig.c).
fn decode(text: &str) -> Option<BigUint> {
    if text.is_empty() || text.len() > DIGITS_MAX {
        return None;
    }
    let digits: Option<Vec<u8>> = text.bytes().map(digit).collect();
    BigUint::from_radix_le(&digits?, 64)
}

fn digit(character: u8) -> Option<u8> {
    Some(match character {
        b'a'..=b'z' => character - b'a',
        b'A'..=b'Z' => character - b'A' + 26,
        b'0'..=b'9' => character - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}

/// `emLen` of RFC 8017.
const ENCODED_BYTES: usize = 256;
/// `hLen` and `sLen`: the output of SHA-256.
const HASH_BYTES: usize = 32;

/// Whether this is a PSS encoding of the hash (EMSA-PSS-VERIFY, RFC 8017, 9.1.2, with `emBits` 2047).
fn is_pss(encoded: &BigUint, hash: &[u8]) -> bool {
    let number = encoded.to_bytes_be();
    let mut block = [0; ENCODED_BYTES];
    block[ENCODED_BYTES - number.len()..].copy_from_slice(&number);
    let (masked, rest) = block.split_at_mut(ENCODED_BYTES - HASH_BYTES - 1);
    let (seed, trailer) = rest.split_at(HASH_BYTES);
    if trailer != [0xbc] || masked[0] & 0x80 != 0 {
        return false; // the second is impossible below a modulus of 2047 bits
    }
    // MGF1 (B.2.1)
    for (counter, part) in (0u32..).zip(masked.chunks_mut(HASH_BYTES)) {
        let mask = Sha256::new().chain_update(seed);
        let mask = mask.chain_update(counter.to_be_bytes()).finalize();
        part.iter_mut()
            .zip(mask)
            .for_each(|(byte, mask)| *byte ^= mask);
    }
    masked[0] &= 0x7f;
    let (padding, salt) = masked.split_at(masked.len() - HASH_BYTES);
    let Some((1, zeros)) = padding.split_last() else {
        return false;
    };
    let expected = Sha256::new().chain_update([0; 8]).chain_update(hash);
    let expected = expected.chain_update(salt).finalize();
    zeros.iter().all(|byte| *byte == 0) && expected[..] == *seed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(number: &BigUint) -> String {
        const DIGITS: &[u8; 64] =
            b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/";
        let digits = number.to_radix_le(64);
        let digits = digits
            .iter()
            .map(|&digit| DIGITS[usize::from(digit)] as char);
        digits.collect()
    }

    #[test]
    fn the_least_significant_digit_comes_first() {
        for (text, number) in [
            ("a", 0u32),
            ("b", 1),
            ("baa", 1),
            ("/", 63),
            ("ab", 64),
            ("+/", 62 + 63 * 64),
        ] {
            assert_eq!(decode(text), Some(number.into()), "{text}");
        }
        let long = "a".repeat(DIGITS_MAX + 1);
        for text in ["", "a b", "a-", "\u{e4}", "DSIG:", &long] {
            assert_eq!(decode(text), None, "{text}");
        }
    }

    #[test]
    fn a_signature_is_a_number_below_the_modulus() {
        for key in [Key::of_info(), Key::of_body()] {
            let recover = |number: &BigUint| key.recover(Some(&encode(number)), Place::Info);
            let highest = &key.modulus - 1u32;
            assert_eq!(recover(&highest), Ok(highest)); // -1 to an odd power
            let unknown = Err(SignatureError::UnknownScheme(Place::Info));
            assert_eq!(recover(&key.modulus), unknown);
            assert_eq!(
                key.recover(Some(&"/".repeat(DIGITS_MAX)), Place::Info),
                unknown
            );
        }
    }

    /// EMSA-PSS-ENCODE, RFC 8017, 9.1.1.
    fn pss(hash: &[u8], salt: &[u8; HASH_BYTES]) -> Vec<u8> {
        let seed = Sha256::new().chain_update([0; 8]).chain_update(hash);
        let seed = seed.chain_update(salt).finalize();
        let mut block = vec![0; ENCODED_BYTES - 2 * HASH_BYTES - 2];
        block.push(1);
        block.extend(salt);
        let mask = (0u32..7).flat_map(|counter| {
            let mask = Sha256::new().chain_update(seed);
            mask.chain_update(counter.to_be_bytes()).finalize()
        });
        block
            .iter_mut()
            .zip(mask)
            .for_each(|(byte, mask)| *byte ^= mask);
        block[0] &= 0x7f;
        block.extend(seed);
        block.push(0xbc);
        block
    }

    #[test]
    fn a_pss_encoding_is_valid_for_one_hash_and_no_bit_of_it_can_change() {
        let hash = Sha256::digest("a list");
        for salt in 0..8 {
            let encoded = pss(&hash, &[salt; HASH_BYTES]);
            assert!(is_pss(&BigUint::from_bytes_be(&encoded), &hash));
            let other = Sha256::digest("another");
            assert!(!is_pss(&BigUint::from_bytes_be(&encoded), &other));
            for bit in 0..8 * ENCODED_BYTES {
                let mut changed = encoded.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert!(!is_pss(&BigUint::from_bytes_be(&changed), &hash), "{bit}");
            }
        }
        assert!(!is_pss(&BigUint::ZERO, &hash));
    }

    #[test]
    fn an_md5_signature_is_the_root_of_the_md5() {
        // 1 is its own root with every key: the one signature that anybody can make.
        let mut one = [0; 16];
        one[15] = 1;
        assert_eq!(verify_body(&one, Some("b")), Ok(()));
        let unknown = Err(SignatureError::UnknownSigner(Place::Header));
        assert_eq!(verify_body(&[7; 16], Some("b")), unknown);
        assert_eq!(verify_body(&[0; 16], Some("b")), unknown);
        let missing = Err(SignatureError::Missing(Place::Header));
        assert_eq!(verify_body(&one, None), missing);
        let around = encode(&(Key::of_body().modulus + 1u32));
        let scheme = Err(SignatureError::UnknownScheme(Place::Header));
        assert_eq!(verify_body(&one, Some(&around)), scheme);
    }

    #[test]
    fn missing_unknown_and_foreign_signatures_are_different_errors() {
        let missing = Err(SignatureError::Missing(Place::Info));
        assert_eq!(verify_info("a list", None), missing);
        let unknown = Err(SignatureError::UnknownSigner(Place::Info));
        assert_eq!(verify_info("a list", Some("b")), unknown);
        let scheme = Err(SignatureError::UnknownScheme(Place::Info));
        assert_eq!(verify_info("a list", Some("PKCS7 MIIB")), scheme);
    }
}
