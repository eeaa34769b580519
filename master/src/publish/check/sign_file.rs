//! Verifies the detached signature of a container, a `.cvd.sign` file of ClamAV 1.5, against a directory
//! of CA certificates.
//!
//! The first line of the file is `#clamsign-1.0`. Each further line is `MIN:MAX:pkcs7-pem:BASE64`: a CMS
//! `SignedData` over the bytes of the `.cvd`, for the feature levels of ClamAV from MIN to MAX.
//!
//! ClamAV verifies with OpenSSL's `PKCS7_verify`, which checks the purpose "S/MIME signing"; the rules for
//! key usage here are the same. There are three differences. Every line must verify, because each one
//! decides on some ClamAV version. A certificate in the directory is trusted although it is no root. Only
//! RSA signatures with signed attributes are known, which is what ClamAV's own tool makes.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clamcast_daemon::input;
use cms::cert::CertificateChoices;
use cms::cert::x509::Certificate;
use cms::cert::x509::der::asn1::{ObjectIdentifier, OctetString};
use cms::cert::x509::der::{self, Decode as _, Encode as _};
use cms::cert::x509::ext::pkix::KeyUsage;
use cms::content_info::ContentInfo;
use cms::signed_data::{SignedAttributes, SignedData, SignerIdentifier, SignerInfo};
use jiff::Timestamp;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use webpki::{EndEntityCert, anchor_from_trusted_cert};

/// Longest `.cvd.sign` in bytes. A line of ClamAV has 5 kB, with certificates of RSA-4096.
pub const SIGN_FILE_BYTES_MAX: usize = 256 << 10;

/// Signatures in one file: more than one only while ClamAV changes its keys or its format.
const SIGNATURES_MAX: usize = 8;

/// Signers of one signature. OpenSSL makes one.
const SIGNERS_MAX: usize = 4;

/// Certificates in one signature: the signer's and those between it and the root.
const CHAIN_MAX: usize = 8;

/// Entries of a directory of certificates.
const ENTRIES_MAX: usize = 1000;

/// Certificates in one directory. Each one may cost a verification.
const CERTIFICATES_MAX: usize = 100;

/// Largest file of certificates in bytes.
const CERTIFICATE_FILE_BYTES_MAX: u64 = 256 << 10;

/// Bytes of a `.cvd` that are read at a time.
const READ_BYTES: usize = 64 << 10;

const HEADER: &str = "#clamsign-1.0";
const PKCS7: &str = "pkcs7-pem";

const ID_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.1");
const ID_SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const ID_CONTENT_TYPE: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.3");
const ID_MESSAGE_DIGEST: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.9.4");
const ID_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");

/// The hash functions, with their own identifier and that of RSA with them.
const HASHES: [(Hash, ObjectIdentifier, ObjectIdentifier); 3] = [
    (
        Hash::Sha256,
        ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1"),
        ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11"),
    ),
    (
        Hash::Sha384,
        ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.2"),
        ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.12"),
    ),
    (
        Hash::Sha512,
        ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.3"),
        ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.13"),
    ),
];

/// `emailProtection`, as it stands in a certificate. OpenSSL asks for it when it verifies a PKCS #7
/// signature, in the signer's certificate and in those between it and the root, if they restrict the
/// extended key usage at all.
const EMAIL_PROTECTION: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 4];

/// Why a `.cvd.sign` does not vouch for a `.cvd`.
#[derive(Debug, thiserror::Error)]
pub enum SignFileError {
    /// Longer than any signature file.
    #[error("it has more than {SIGN_FILE_BYTES_MAX} bytes, which no signature file has")]
    TooLong,
    /// Something else, or a later version.
    #[error("its first line is not `{HEADER}`")]
    Header,
    /// A line that is no signature.
    #[error("line {line} is not a signature: expected `MIN:MAX:TYPE:DATA`")]
    Line {
        /// Its number, from 1.
        line: usize,
    },
    /// The data of a line is not what its type says.
    #[error("line {line} has no base64 in it where the signature should be")]
    Base64 {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        source: base64::DecodeError,
    },
    /// The structure of a signature cannot be read.
    #[error("the signature in line {line} is damaged")]
    Damaged {
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        source: der::Error,
    },
    /// More than any signature file has.
    #[error("it has more than {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// No line of a known type.
    #[error("it has no signature of the type `{PKCS7}`")]
    Empty,
    /// A signature that this version cannot verify.
    #[error("this version cannot verify the signature: {0}")]
    Unsupported(String),
    /// The signer's certificate is not in the signature.
    #[error("the signature has no certificate of its signer")]
    NoSigner,
    /// The `.cvd` has other bytes.
    #[error("the signature is that of a file with other content")]
    Content,
    /// The key of the certificate did not make it.
    #[error("the signature does not verify with the key of `{signer}`")]
    Signature {
        /// The subject of the signer's certificate.
        signer: String,
    },
    /// No chain of certificates ends in the directory.
    #[error("no certificate of the directory vouches for it (signed by `{signer}`)")]
    Untrusted {
        /// The subject of the signer's certificate.
        signer: String,
    },
    /// A chain ends in the directory, and one of its certificates must not be used.
    #[error("a certificate of the chain of `{signer}` cannot be used: {reason}")]
    Certificate {
        /// The subject of the signer's certificate.
        signer: String,
        /// Why not.
        reason: String,
    },
    /// The `.cvd` cannot be read.
    #[error("cannot read the signed file")]
    Read(#[source] io::Error),
}

/// Why a directory of certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificatesError {
    /// The directory or a file in it cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file without a certificate, or with a damaged one.
    #[error("{} is not a file of PEM certificates: {reason}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Nothing to trust.
    #[error(
        "{} has no certificates: expected files named `*.crt` or `*.pem`, such as the `clamav.crt` \
         of ClamAV 1.5",
        path.display()
    )]
    Empty {
        /// The directory.
        path: PathBuf,
    },
    /// More than any such directory has.
    #[error("{} has more than {CERTIFICATES_MAX} certificates", path.display())]
    TooMany {
        /// The directory.
        path: PathBuf,
    },
}

/// The certificates of a directory. Each one is trusted.
#[derive(Clone, Debug)]
pub struct Certificates(Vec<Trusted>);

#[derive(Clone, Debug)]
struct Trusted {
    der: CertificateDer<'static>,
    subject: String,
    not_before: Duration,
    not_after: Duration,
    may_sign_certificates: bool,
}

impl Certificates {
    /// Reads the files `*.crt` and `*.pem` of a directory, as ClamAV does.
    pub fn load(directory: &Path) -> Result<Self, CertificatesError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CertificatesError::Read { path, source }
        };
        let mut names = input::names(directory, ENTRIES_MAX).map_err(failed(directory))?;
        names.sort();
        let mut found = Vec::new();
        for name in names {
            let path = directory.join(name);
            let extension = path.extension().and_then(|it| it.to_str());
            if !matches!(extension, Some("crt" | "pem")) {
                continue;
            }
            let bytes = input::whole(&path, CERTIFICATE_FILE_BYTES_MAX).map_err(failed(&path))?;
            let before = found.len();
            for certificate in CertificateDer::pem_slice_iter(&bytes) {
                let read = certificate.map_err(|error| error.to_string());
                let trusted = read.and_then(Trusted::new);
                found.push(trusted.map_err(|reason| CertificatesError::Damaged {
                    path: path.clone(),
                    reason,
                })?);
                if found.len() > CERTIFICATES_MAX {
                    let path = directory.to_owned();
                    return Err(CertificatesError::TooMany { path });
                }
            }
            if found.len() == before {
                let reason = "it has no `BEGIN CERTIFICATE`".to_owned();
                return Err(CertificatesError::Damaged { path, reason });
            }
        }
        match found.is_empty() {
            true => Err(CertificatesError::Empty {
                path: directory.to_owned(),
            }),
            false => Ok(Self(found)),
        }
    }
}

impl Trusted {
    fn new(der: CertificateDer<'static>) -> Result<Self, String> {
        let certificate = Certificate::from_der(&der).map_err(|error| error.to_string())?;
        anchor_from_trusted_cert(&der).map_err(|error| error.to_string())?;
        let validity = &certificate.tbs_certificate.validity;
        let usage = key_usage(&certificate).map_err(|error| error.to_string())?;
        Ok(Self {
            subject: subject(&certificate),
            not_before: validity.not_before.to_unix_duration(),
            not_after: validity.not_after.to_unix_duration(),
            may_sign_certificates: usage.is_none_or(|usage| usage.key_cert_sign()),
            der,
        })
    }

    /// Why it vouches for nothing, if it does not.
    fn fault(&self, now: Duration) -> Option<&'static str> {
        if !self.may_sign_certificates {
            Some("is not for signing certificates")
        } else if now < self.not_before {
            Some("is not valid yet")
        } else if now > self.not_after {
            Some("has expired")
        } else {
            None
        }
    }
}

/// Verifies that every signature of the `.cvd.sign` file `sign` is one of `cvd`, by a signer that a
/// certificate of the directory vouches for.
pub fn verify(
    sign: &[u8],
    cvd: impl Read,
    certificates: &Certificates,
    now: Timestamp,
) -> Result<(), SignFileError> {
    let signatures = signatures(sign)?;
    let mut wanted: BTreeMap<Hash, Vec<u8>> = BTreeMap::new();
    for signer in signatures.iter().flat_map(|it| it.signer_infos.0.iter()) {
        wanted.insert(hash_of(signer)?, Vec::new());
    }
    let digests = digests(wanted, cvd)?;
    // Before 1970 no certificate is valid.
    let now = Duration::from_secs(u64::try_from(now.as_second()).unwrap_or(0));
    for signature in &signatures {
        check(signature, &digests, certificates, now)?;
    }
    Ok(())
}

/// The signatures of a file. Lines of an unknown type are for later versions of ClamAV.
fn signatures(sign: &[u8]) -> Result<Vec<SignedData>, SignFileError> {
    if sign.len() > SIGN_FILE_BYTES_MAX {
        return Err(SignFileError::TooLong);
    }
    let mut lines = sign.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    if lines.next() != Some(HEADER.as_bytes()) {
        return Err(SignFileError::Header);
    }
    let mut found = Vec::new();
    for (number, line) in (2..).zip(lines) {
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let malformed = || SignFileError::Line { line: number };
        let text = str::from_utf8(line).map_err(|_| malformed())?;
        let mut fields = text.splitn(4, ':');
        let (Some(min), Some(max), Some(kind), Some(data)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(malformed());
        };
        let is_level = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if !is_level(min) || !is_level(max) {
            return Err(malformed());
        }
        if kind != PKCS7 {
            continue;
        }
        if found.len() == SIGNATURES_MAX {
            return Err(SignFileError::TooMany {
                what: "signatures",
                limit: SIGNATURES_MAX,
            });
        }
        let der = STANDARD
            .decode(data)
            .map_err(|source| SignFileError::Base64 {
                line: number,
                source,
            })?;
        found.push(signed_data(&der, number)?);
    }
    match found.is_empty() {
        true => Err(SignFileError::Empty),
        false => Ok(found),
    }
}

/// Reads the structure of one signature.
fn signed_data(der: &[u8], line: usize) -> Result<SignedData, SignFileError> {
    let damaged = |source| SignFileError::Damaged { line, source };
    let content = ContentInfo::from_der(der).map_err(damaged)?;
    if content.content_type != ID_SIGNED_DATA {
        let what = format!("the content type {}", content.content_type);
        return Err(SignFileError::Unsupported(what));
    }
    let data: SignedData = content.content.decode_as().map_err(damaged)?;
    let too_many = |what, limit| SignFileError::TooMany { what, limit };
    let certificates = data.certificates.as_ref().map_or(0, |it| it.0.len());
    if certificates > CHAIN_MAX {
        return Err(too_many("certificates in a signature", CHAIN_MAX));
    }
    if data.signer_infos.0.len() > SIGNERS_MAX {
        return Err(too_many("signers of a signature", SIGNERS_MAX));
    }
    if data.signer_infos.0.is_empty() {
        return Err(SignFileError::NoSigner);
    }
    let content = &data.encap_content_info;
    if content.econtent_type != ID_DATA || content.econtent.is_some() {
        let what = "it is not a detached signature of bytes".to_owned();
        return Err(SignFileError::Unsupported(what));
    }
    Ok(data)
}

/// Hash functions of signatures.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    /// RSA PKCS #1 1.5 with this hash.
    fn rsa(self) -> &'static dyn SignatureVerificationAlgorithm {
        match self {
            Self::Sha256 => webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA256,
            Self::Sha384 => webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA384,
            Self::Sha512 => webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA512,
        }
    }
}

/// The hash function of a signer, if its signature is one of RSA.
fn hash_of(signer: &SignerInfo) -> Result<Hash, SignFileError> {
    let (digest, signature) = (signer.digest_alg.oid, signer.signature_algorithm.oid);
    let mut hashes = HASHES.iter().filter(|(_, oid, _)| *oid == digest);
    let found = hashes.find(|(_, _, with_rsa)| signature == ID_RSA || signature == *with_rsa);
    found.map(|(hash, _, _)| *hash).ok_or_else(|| {
        SignFileError::Unsupported(format!(
            "algorithm {signature} with digest {digest}; RSA with SHA-256, SHA-384 or SHA-512 is known"
        ))
    })
}

/// Reads all of `cvd` and returns its digests by these hash functions.
fn digests(
    mut wanted: BTreeMap<Hash, Vec<u8>>,
    mut cvd: impl Read,
) -> Result<BTreeMap<Hash, Vec<u8>>, SignFileError> {
    let wants = |hash| wanted.contains_key(&hash);
    let mut sha256 = wants(Hash::Sha256).then(Sha256::new);
    let mut sha384 = wants(Hash::Sha384).then(Sha384::new);
    let mut sha512 = wants(Hash::Sha512).then(Sha512::new);
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let read = match cvd.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => &buffer[..read],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(SignFileError::Read(error)),
        };
        sha256.iter_mut().for_each(|it| it.update(read));
        sha384.iter_mut().for_each(|it| it.update(read));
        sha512.iter_mut().for_each(|it| it.update(read));
    }
    let digests = [
        sha256.map(|it| (Hash::Sha256, it.finalize().to_vec())),
        sha384.map(|it| (Hash::Sha384, it.finalize().to_vec())),
        sha512.map(|it| (Hash::Sha512, it.finalize().to_vec())),
    ];
    wanted.extend(digests.into_iter().flatten());
    Ok(wanted)
}

/// Verifies one signature, by all of its signers.
fn check(
    signature: &SignedData,
    digests: &BTreeMap<Hash, Vec<u8>>,
    certificates: &Certificates,
    now: Duration,
) -> Result<(), SignFileError> {
    let choices = signature.certificates.iter().flat_map(|it| it.0.iter());
    let included: Vec<&Certificate> = choices
        .filter_map(|choice| match choice {
            CertificateChoices::Certificate(certificate) => Some(certificate),
            CertificateChoices::Other(_) => None,
        })
        .collect();
    let encoded = |certificate: &Certificate| certificate.to_der().map(CertificateDer::from);
    let chain: Vec<_> = included.iter().filter_map(|it| encoded(it).ok()).collect();
    for info in signature.signer_infos.0.iter() {
        let mut candidates = included.iter().filter(|it| is_named(it, &info.sid));
        let signer = candidates.next().ok_or(SignFileError::NoSigner)?;
        let name = subject(signer);
        let invalid = || SignFileError::Signature {
            signer: name.clone(),
        };
        let unusable = |reason: String| SignFileError::Certificate {
            signer: name.clone(),
            reason,
        };
        let hash = hash_of(info)?;
        let attributes = info
            .signed_attrs
            .as_ref()
            .ok_or_else(|| SignFileError::Unsupported("it has no signed attributes".to_owned()))?;
        let digest = signed_digest(attributes)?;
        if digests.get(&hash) != Some(&digest) {
            return Err(SignFileError::Content);
        }
        let der = encoded(signer).map_err(|error| unusable(error.to_string()))?;
        let end = EndEntityCert::try_from(&der).map_err(|error| unusable(error.to_string()))?;
        // What is signed is the set of attributes in DER.
        let signed = attributes.to_der().map_err(|_| invalid())?;
        end.verify_signature(hash.rsa(), &signed, info.signature.as_bytes())
            .map_err(|_| invalid())?;
        let usage = key_usage(signer).map_err(|error| unusable(error.to_string()))?;
        if usage.is_some_and(|usage| !usage.digital_signature() && !usage.non_repudiation()) {
            return Err(unusable("it is not for signatures".to_owned()));
        }
        vouched(&end, &chain, certificates, &name, now)?;
    }
    Ok(())
}

/// Whether a signer means this certificate.
fn is_named(certificate: &Certificate, sid: &SignerIdentifier) -> bool {
    use cms::cert::x509::ext::pkix::SubjectKeyIdentifier;
    let certificate = &certificate.tbs_certificate;
    match sid {
        SignerIdentifier::IssuerAndSerialNumber(it) => {
            it.issuer == certificate.issuer && it.serial_number == certificate.serial_number
        }
        SignerIdentifier::SubjectKeyIdentifier(it) => {
            let own = certificate.get::<SubjectKeyIdentifier>();
            matches!(own, Ok(Some((_, own))) if own == *it)
        }
    }
}

/// The digest that the attributes are about. Each of both attributes must be there once, with one value.
fn signed_digest(attributes: &SignedAttributes) -> Result<Vec<u8>, SignFileError> {
    let single = |oid| {
        let mut found = attributes.iter().filter(|attribute| attribute.oid == oid);
        match (found.next(), found.next()) {
            (Some(attribute), None) if attribute.values.len() == 1 => attribute.values.get(0),
            _ => None,
        }
    };
    let kind = single(ID_CONTENT_TYPE).and_then(|it| it.decode_as::<ObjectIdentifier>().ok());
    let digest = single(ID_MESSAGE_DIGEST).and_then(|it| it.decode_as::<OctetString>().ok());
    match (kind, digest) {
        (Some(ID_DATA), Some(digest)) => Ok(digest.into_bytes()),
        _ => {
            let what = "its signed attributes do not name the digest of bytes".to_owned();
            Err(SignFileError::Unsupported(what))
        }
    }
}

/// Finds a chain of certificates from a signer's to one of the directory.
fn vouched(
    end: &EndEntityCert<'_>,
    chain: &[CertificateDer<'_>],
    certificates: &Certificates,
    signer: &str,
    now: Duration,
) -> Result<(), SignFileError> {
    let verify = |trusted: &[&Trusted]| {
        let anchors = trusted.iter().map(|it| anchor_from_trusted_cert(&it.der));
        let anchors: Vec<TrustAnchor<'_>> = anchors.filter_map(Result::ok).collect();
        end.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            chain,
            UnixTime::since_unix_epoch(now),
            webpki::KeyUsage::required_if_present(EMAIL_PROTECTION),
            None, // ClamAV looks for no revocations either
            Some(
                &|path| match path.intermediate_certificates().all(may_sign) {
                    true => Ok(()),
                    false => Err(webpki::Error::EndEntityUsedAsCa),
                },
            ),
        )
        .map(|_path| ())
    };
    let (usable, other): (Vec<_>, Vec<_>) = certificates
        .0
        .iter()
        .partition(|trusted| trusted.fault(now).is_none());
    let Err(error) = verify(&usable) else {
        return Ok(());
    };
    let unusable = |reason: String| SignFileError::Certificate {
        signer: signer.to_owned(),
        reason,
    };
    // A CA of the directory may have the name of the issuer and another key.
    let is_unknown = matches!(
        error,
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey
    );
    if !is_unknown {
        return Err(unusable(error.to_string()));
    }
    for trusted in other {
        if verify(&[trusted]).is_ok()
            && let Some(fault) = trusted.fault(now)
        {
            let subject = &trusted.subject;
            return Err(unusable(format!("`{subject}` of the directory {fault}")));
        }
    }
    Err(SignFileError::Untrusted {
        signer: signer.to_owned(),
    })
}

/// Whether a certificate between the signer's and the root may sign others.
fn may_sign(certificate: &webpki::Cert<'_>) -> bool {
    let Ok(certificate) = Certificate::from_der(&certificate.der()) else {
        return false;
    };
    key_usage(&certificate).is_ok_and(|it| it.is_none_or(|usage| usage.key_cert_sign()))
}

/// The key usage that a certificate is restricted to, if it is.
fn key_usage(certificate: &Certificate) -> Result<Option<KeyUsage>, der::Error> {
    let usage = certificate.tbs_certificate.get::<KeyUsage>()?;
    Ok(usage.map(|(_critical, usage)| usage))
}

/// The subject of a certificate, for messages. Control characters of it are escaped.
fn subject(certificate: &Certificate) -> String {
    let subject = certificate.tbs_certificate.subject.to_string();
    subject
        .chars()
        .take(SUBJECT_CHARS_MAX)
        .flat_map(|c| match c.is_control() {
            true => c.escape_default().collect::<Vec<_>>(),
            false => vec![c],
        })
        .collect()
}

/// Characters of a certificate's subject in a message.
const SUBJECT_CHARS_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};
    use std::fs;
    use std::process::Command;

    const CA: &str = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n";
    const SIGNER: &str = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
                          extendedKeyUsage=critical,codeSigning,emailProtection\n";
    const CVD: &[u8] = b"ClamAV-VDB: the bytes of a database";
    const DAY: i64 = 24 * 60 * 60;

    /// A CA, an intermediate CA and a signer, made with openssl.
    struct Pki(tempfile::TempDir);

    impl Pki {
        /// The root is valid for ten days, the others for a year.
        fn new() -> Self {
            let pki = Self(tempfile::tempdir().unwrap());
            fs::create_dir(pki.path("certs")).unwrap();
            pki.key("root");
            let root =
                "req -x509 -new -key root.key -out certs/root.crt -days 10 -config /dev/null";
            pki.openssl(
                &format!("{root} -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign"),
                &["-subj", "/CN=Test Root"],
            );
            pki.issue_both(CA, SIGNER);
            pki
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn key(&self, name: &str) {
            if self.path(&format!("{name}.key")).exists() {
                return; // a certificate that is issued again keeps its key
            }
            self.openssl(&format!("genrsa -out {name}.key 2048"), &[]);
        }

        fn issue_both(&self, intermediate: &str, signer: &str) {
            self.issue("intermediate", intermediate, "certs/root.crt", "root.key");
            self.issue("signer", signer, "intermediate.pem", "intermediate.key");
        }

        fn issue(&self, name: &str, extensions: &str, issuer: &str, key: &str) {
            self.key(name);
            fs::write(self.path("extensions"), extensions).unwrap();
            let subject = format!("/O=Test/CN={name}");
            let request = format!("req -new -key {name}.key -out {name}.csr -config /dev/null");
            self.openssl(&request, &["-subj", &subject]);
            self.openssl(
                &format!(
                    "x509 -req -in {name}.csr -CA {issuer} -CAkey {key} -set_serial 0 -days 365 \
                     -extfile extensions -out {name}.pem"
                ),
                &[],
            );
        }

        /// A detached signature in DER.
        fn sign(&self, cvd: &[u8], options: &str) -> Vec<u8> {
            fs::write(self.path("cvd"), cvd).unwrap();
            self.openssl(
                &format!(
                    "cms -sign -binary -in cvd -outform DER -out signature -signer signer.pem \
                     -inkey signer.key -certfile intermediate.pem {options}"
                ),
                &[],
            );
            fs::read(self.path("signature")).unwrap()
        }

        fn openssl(&self, command: &str, more: &[&str]) {
            let words = command.split_whitespace().chain(more.iter().copied());
            let mut openssl = Command::new("openssl");
            openssl.current_dir(self.0.path()).args(words);
            let output = openssl.output().expect("this test needs openssl(1)");
            assert!(output.status.success(), "openssl {command}: {output:?}");
        }

        fn certificates(&self) -> Certificates {
            Certificates::load(&self.path("certs")).unwrap()
        }

        /// Verifies a file of this text, so many days from now.
        fn verify(&self, text: &str, cvd: &[u8], days: i64) -> Result<(), SignFileError> {
            let now = Timestamp::from_second(Timestamp::now().as_second() + 60 + days * DAY);
            verify(text.as_bytes(), cvd, &self.certificates(), now.unwrap())
        }
    }

    fn file(signatures: &[&[u8]]) -> String {
        let lines = signatures.iter().map(|der| STANDARD.encode(der));
        let lines = lines.map(|text| format!("230::pkcs7-pem:{text}\n"));
        format!("{HEADER}\n{}", lines.collect::<String>())
    }

    #[track_caller]
    fn check(verified: Result<(), SignFileError>, expected: &str) {
        let error = verified.map_err(|error| crate::chain(&error));
        match (error, expected) {
            (Ok(()), "") => {}
            (Err(error), _) if !expected.is_empty() && error.contains(expected) => {}
            (verified, _) => panic!("expected `{expected}`: {verified:?}"),
        }
    }

    #[test]
    fn what_openssl_signs_verifies_and_other_content_does_not() {
        let pki = Pki::new();
        let mut signatures = Vec::new();
        for options in ["-md sha256", "-md sha384 -nosmimecap", "-md sha512 -keyid"] {
            signatures.push(pki.sign(CVD, options));
            check(
                pki.verify(&file(&[&signatures[signatures.len() - 1]]), CVD, 0),
                "",
            );
        }
        let all: Vec<_> = signatures.iter().map(Vec::as_slice).collect();
        let text = file(&all);
        check(pki.verify(&text, CVD, 0), "");
        check(
            pki.verify(&text, b"another", 0),
            "of a file with other content",
        );
        let text = text.replace('\n', "\r\n\n# a comment\n9:99:mldsa:later\n");
        let text = text.replacen("\r\n", "\n", 1);
        check(pki.verify(&text, CVD, 0), "");
        let other = pki.sign(b"another", "");
        let text = file(&[&signatures[0], &other]);
        check(pki.verify(&text, CVD, 0), "of a file with other content");
    }

    #[test]
    fn what_openssl_verifies_and_this_does_not_is_named() {
        let pki = Pki::new();
        for (options, expected) in [
            ("-nodetach", "not a detached signature"),
            ("-noattr", "no signed attributes"),
            ("-nocerts", "no certificate of its signer"),
            ("-md sha1", "algorithm"),
            (
                "-keyopt rsa_padding_mode:pss",
                "algorithm 1.2.840.113549.1.1.10",
            ),
        ] {
            let der = pki.sign(CVD, options);
            check(pki.verify(&file(&[&der]), CVD, 0), expected);
        }
    }

    #[test]
    fn a_signature_by_another_key_does_not_verify() {
        let pki = Pki::new();
        let mut der = pki.sign(CVD, "");
        let last = der.len() - 1; // of the RSA signature
        der[last] ^= 1;
        check(
            pki.verify(&file(&[&der]), CVD, 0),
            "does not verify with the key of `CN=signer,O=Test`",
        );
    }

    #[test]
    fn a_chain_must_end_in_the_directory_and_be_valid() {
        let pki = Pki::new();
        let text = file(&[&pki.sign(CVD, "")]);
        check(pki.verify(&text, CVD, 0), "");
        check(
            pki.verify(&text, CVD, 11),
            "`CN=Test Root` of the directory has expired",
        );
        check(pki.verify(&text, CVD, -1), "of the chain of `CN=signer");
        // The intermediate certificate in the directory is trusted as it is, and outlives the root.
        fs::copy(pki.path("intermediate.pem"), pki.path("certs/b.pem")).unwrap();
        check(pki.verify(&text, CVD, 11), "");
        check(pki.verify(&text, CVD, 400), "of the chain of `CN=signer");
        let other = Pki::new();
        fs::copy(other.path("certs/root.crt"), pki.path("certs/b.pem")).unwrap();
        fs::remove_file(pki.path("certs/root.crt")).unwrap();
        check(
            pki.verify(&text, CVD, 0),
            "no certificate of the directory vouches for it (signed by `CN=signer,O=Test`)",
        );
    }

    #[test]
    fn key_usage_is_that_of_smime_signing() {
        let signer = |usage: &str| format!("basicConstraints=critical,CA:FALSE\n{usage}\n");
        let intermediate = |usage: &str| format!("basicConstraints=critical,CA:TRUE\n{usage}\n");
        let chain = "of the chain of `CN=signer";
        let pki = Pki::new();
        for (intermediate, signer, expected) in [
            (CA.to_owned(), signer(""), ""),
            (CA.to_owned(), signer("keyUsage=nonRepudiation"), ""),
            (
                CA.to_owned(),
                signer("keyUsage=keyEncipherment"),
                "not for signatures",
            ),
            (CA.to_owned(), signer("extendedKeyUsage=codeSigning"), chain),
            (intermediate(""), SIGNER.to_owned(), ""),
            (intermediate("keyUsage=cRLSign"), SIGNER.to_owned(), chain),
            (
                intermediate("extendedKeyUsage=OCSPSigning,emailProtection"),
                SIGNER.to_owned(),
                "",
            ),
            (
                intermediate("extendedKeyUsage=OCSPSigning"),
                SIGNER.to_owned(),
                chain,
            ),
            (signer(""), SIGNER.to_owned(), chain),
        ] {
            pki.issue_both(&intermediate, &signer);
            let text = file(&[&pki.sign(CVD, "")]);
            println!("{intermediate}{signer}");
            check(pki.verify(&text, CVD, 0), expected);
        }
    }

    #[test]
    fn what_is_no_signature_file_is_refused() {
        let none = Certificates(Vec::new());
        let check = |text: &[u8], expected: &str| {
            super::tests::check(verify(text, CVD, &none, Timestamp::now()), expected);
        };
        check(b"", "its first line");
        check(b"#clamsign-2.0\n", "its first line");
        check(b"#clamsign-1.0\n\n# nothing\n", "no signature of the type");
        check(
            b"#clamsign-1.0\n1::other:AAAA\n",
            "no signature of the type",
        );
        check(
            b"#clamsign-1.0\n\n230::pkcs7-pem\n",
            "line 3 is not a signature",
        );
        check(
            b"#clamsign-1.0\n-1::pkcs7-pem:AAAA\n",
            "line 2 is not a signature",
        );
        check(b"#clamsign-1.0\n\xff\n", "line 2 is not a signature");
        check(b"#clamsign-1.0\n230::pkcs7-pem:*\n", "line 2 has no base64");
        check(
            b"#clamsign-1.0\n230::pkcs7-pem:AAAA\n",
            "in line 2 is damaged",
        );
        check(&[b'#'; SIGN_FILE_BYTES_MAX + 1], "more than 262144 bytes");
    }

    #[test]
    fn more_than_a_signature_file_has_is_refused() {
        let pki = Pki::new();
        let der = pki.sign(CVD, "");
        let many = vec![der.as_slice(); SIGNATURES_MAX + 1];
        check(pki.verify(&file(&many), CVD, 0), "more than 8 signatures");
        let mut signers = String::new();
        for number in 0..SIGNERS_MAX {
            let name = format!("signer{number}");
            pki.issue(&name, SIGNER, "intermediate.pem", "intermediate.key");
            signers += &format!(" -signer {name}.pem -inkey {name}.key");
        }
        let der = pki.sign(CVD, &signers);
        check(pki.verify(&file(&[&der]), CVD, 0), "signers of a signature");
        let mut chain = fs::read(pki.path("intermediate.pem")).unwrap();
        for number in 0..CHAIN_MAX {
            let name = format!("more{number}");
            pki.issue(&name, CA, "certs/root.crt", "root.key");
            chain.extend(fs::read(pki.path(&format!("{name}.pem"))).unwrap());
        }
        fs::write(pki.path("chain.pem"), chain).unwrap();
        let der = pki.sign(CVD, "-certfile chain.pem");
        check(
            pki.verify(&file(&[&der]), CVD, 0),
            "certificates in a signature",
        );
    }

    #[test]
    fn a_damaged_signature_never_panics() {
        let pki = Pki::new();
        let certificates = pki.certificates();
        let der = pki.sign(CVD, "");
        let now = Timestamp::now();
        for end in 0..der.len() {
            let text = file(&[&der[..end]]);
            assert!(
                verify(text.as_bytes(), CVD, &certificates, now).is_err(),
                "{end}"
            );
        }
        for seed in 0..3000 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut der = der.clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..der.len());
                match random.random_range(0..3) {
                    0 => der[at] ^= 1 << random.random_range(0..8),
                    1 => der[at] = random.random(),
                    _ => _ = der.remove(at),
                }
            }
            // Some bytes are not covered, such as the list of digest algorithms; the content is.
            let text = file(&[&der]);
            let _ = verify(text.as_bytes(), CVD, &certificates, now);
            let other = verify(text.as_bytes(), &b"another"[..], &certificates, now);
            assert!(other.is_err(), "seed {seed}");
        }
    }

    #[test]
    fn a_directory_without_usable_certificates_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let check = |expected: &str| {
            let error = Certificates::load(dir.path()).unwrap_err();
            let error = crate::chain(&error);
            assert!(error.contains(expected), "{error}");
        };
        fs::write(dir.path().join("README"), "no certificate").unwrap();
        check("has no certificates");
        fs::write(dir.path().join("a.crt"), "no certificate").unwrap();
        check("a.crt is not a file of PEM certificates: it has no `BEGIN CERTIFICATE`");
        let damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        fs::write(dir.path().join("a.crt"), damaged).unwrap();
        check("a.crt is not a file of PEM certificates");
        let pki = Pki::new();
        let root = fs::read_to_string(pki.path("certs/root.crt")).unwrap();
        fs::write(dir.path().join("a.crt"), root.repeat(CERTIFICATES_MAX + 1)).unwrap();
        check("more than 100 certificates");
        let long = vec![b'\n'; CERTIFICATE_FILE_BYTES_MAX as usize + 1];
        fs::write(dir.path().join("a.crt"), long).unwrap();
        check("cannot read");
        let missing = Certificates::load(&dir.path().join("missing")).unwrap_err();
        assert!(missing.to_string().starts_with("cannot read"), "{missing}");
    }
}
