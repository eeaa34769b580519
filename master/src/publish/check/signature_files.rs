//! Which signature files (`.cvd.sign`) travel with their `.cvd`.
//!
//! A ClamAV from 1.5 on refuses a `.cvd` with a wrong signature file beside it, which is worse than none
//! at all. So only those travel that somebody verified.

use std::path::Path;

use clamcast_daemon::{clamscan, input};
use clamcast_proto::DatabaseName;
use clamcast_proto::names::DatabaseKind;
use jiff::Timestamp;

use super::sign_file::{Certificates, SIGN_FILE_BYTES_MAX, verify};
use crate::chain;
use crate::config::LoadTest;
use crate::publish::capture::Captured;
use crate::store::{Store, StoreError};

/// Who verifies signature files.
#[derive(Debug)]
pub enum SignatureFiles {
    /// We do, with these certificates.
    Certificates(Certificates),
    /// The clamscan of the load test does.
    LoadTest,
    /// Nobody can: why.
    Nobody(String),
}

impl SignatureFiles {
    /// As the configuration and this host's clamscan allow.
    pub fn of(certificates: Option<&Path>, load_test: LoadTest) -> Self {
        match certificates {
            Some(directory) => match Certificates::load(directory) {
                Ok(certificates) => Self::Certificates(certificates),
                Err(error) => Self::Nobody(format!("cannot verify it: {}", chain(&error))),
            },
            None if load_test != LoadTest::Never
                && clamscan::find().and_then(|it| clamscan::version(&it))
                    >= Some(clamscan::READS_SIGNATURE_FILES) =>
            {
                Self::LoadTest
            }
            None => Self::Nobody(
                "nobody can verify it; set `mirror.cvd_certs` to ClamAV's certificates directory"
                    .to_owned(),
            ),
        }
    }

    /// Checks one signature file of a unit: why it does not travel.
    pub fn check(
        &self,
        file: &Captured,
        unit: &[Captured],
        store: &Store,
        now: Timestamp,
    ) -> Result<Result<(), String>, StoreError> {
        let certificates = match self {
            Self::Certificates(certificates) => certificates,
            Self::LoadTest => return Ok(Ok(())),
            Self::Nobody(why) => return Ok(Err(why.clone())),
        };
        let Some(of) = unit.iter().find(|it| signs(&file.name, &it.name)) else {
            return Ok(Err("its .cvd is not in the mirror".to_owned()));
        };
        let database = store.open_object(&of.sha256)?;
        let path = store.object(&file.sha256);
        let verified = match input::whole(&path, SIGN_FILE_BYTES_MAX as u64) {
            Ok(sign) => verify(&sign, database, certificates, now),
            Err(error) => return Ok(Err(format!("cannot read it: {error}"))),
        };
        Ok(verified.map_err(|error| chain(&error)))
    }
}

/// Whether the first file is a signature of the second, by their names.
pub fn signs(signature: &DatabaseName, database: &DatabaseName) -> bool {
    let base = signature.signs().map(|(base, _version)| base);
    database.kind() == DatabaseKind::Cvd && base == Some(database.base())
}
