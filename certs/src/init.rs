//! `clamcast-certs init`: a new fleet.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clamcast_daemon::durable::{self, LockError};
use clamcast_daemon::exit;
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::keys::KeySet;
use clamcast_proto::{Epoch, FleetName};
use ed25519_dalek::SigningKey;
use jiff::Timestamp;

use crate::files::{self, WriteError, Written};
use crate::fleet::{self, Charter};
use crate::{key, x509};

/// What [`init`] did.
#[derive(Debug)]
pub struct Initialised {
    /// What was written.
    pub files: Vec<Written>,
    /// Where the files went that stood in the way.
    pub moved_to: Option<PathBuf>,
    /// An `init` before this one had not finished.
    pub resumed: bool,
}

/// Why no fleet was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is one already.
    #[error(
        "{path} is there: {dir} holds a fleet already, and nothing was changed\n  \
         to add a host: clamcast-certs agent --dir {dir} NAME\n  \
         --force would put a NEW fleet in its place, with another CA and other signing keys: no \
         master and no agent that was set up before would be trusted any more, and EVERY HOST \
         would have to be visited again (the old files would move into {dir}/replaced-TIME-N)"
    )]
    Standing {
        /// The first file in the way.
        path: PathBuf,
        /// The directory.
        dir: PathBuf,
    },
    /// Another command is writing there.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The CA's certificate could not be made.
    #[error("cannot make the CA's certificate")]
    Certificate(#[source] rcgen::Error),
}

impl InitError {
    /// The exit code of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Standing { .. } => exit::USAGE,
            Self::Lock(_) | Self::Write(_) | Self::Certificate(_) => exit::FAILED,
        }
    }
}

/// Everything in a fleet's directory.
const ENTRIES: &[&str] = &[
    fleet::CHARTER,
    fleet::CA,
    fleet::CA_KEY,
    fleet::ROOT_KEY,
    fleet::MANIFEST_KEY,
    fleet::AUDIT_KEY,
    fleet::MANIFEST_KEY_NEXT,
    fleet::MANIFEST_KEY_OLD,
    fleet::AUDIT_KEY_NEXT,
    fleet::AUDIT_KEY_OLD,
    fleet::KEYS,
    fleet::MASTER,
    fleet::AGENTS,
    fleet::ISSUED,
    fleet::REVOKED,
];

/// Makes a fleet in `dir`: a CA, the root, manifest and audit keys, and the key set that agents
/// trust.
///
/// No key is ever overwritten or deleted: what stands in the way is an error without `force`, and
/// moves aside with it. A mark stands from before the first change until everything is on disk;
/// an `init` that finds it starts over, since nothing was issued while it stood.
pub fn init(
    dir: &Path,
    fleet: &FleetName,
    force: bool,
    now: Timestamp,
) -> Result<Initialised, InitError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| WriteError { path, source }
    };
    durable::create_dir(dir, files::DIRECTORY).map_err(failed(dir))?;
    let _guard = fleet::lock(dir)?;

    let mark = dir.join(fleet::UNFINISHED);
    let resumed = files::is_there(&mark);
    let paths = ENTRIES.iter().map(|entry| dir.join(entry));
    let standing: Vec<PathBuf> = paths.filter(|path| files::is_there(path)).collect();
    if let Some(path) = standing.first()
        && !force
        && !resumed
    {
        let (path, dir) = (path.clone(), dir.to_owned());
        return Err(InitError::Standing { path, dir });
    }
    durable::write(&mark, b"", files::PRIVATE).map_err(failed(&mark))?;
    let moved_to = match standing.as_slice() {
        [] => None,
        standing => Some(move_aside(dir, standing, now).map_err(failed(dir))?),
    };
    let files = write_fleet(dir, fleet, now)?;
    // Everything before this is synced: without the mark the fleet is whole.
    fs::remove_file(&mark)
        .and_then(|()| durable::sync_dir(dir))
        .map_err(failed(&mark))?;
    Ok(Initialised {
        files,
        moved_to,
        resumed,
    })
}

/// Moves what stands in the way into a new directory beside it.
fn move_aside(dir: &Path, standing: &[PathBuf], now: Timestamp) -> io::Result<PathBuf> {
    let time = now.strftime("%Y%m%dT%H%M%SZ");
    let aside = (1..)
        .map(|n| dir.join(format!("replaced-{time}-{n}")))
        .find(|aside| !files::is_there(aside))
        .expect("a directory does not hold every number");
    durable::create_dir(&aside, files::DIRECTORY)?;
    for path in standing {
        let name = path.file_name().expect("entries have names");
        fs::rename(path, aside.join(name))?;
    }
    durable::sync_dir(&aside)?;
    durable::sync_dir(dir)?;
    Ok(aside)
}

fn write_fleet(dir: &Path, fleet: &FleetName, now: Timestamp) -> Result<Vec<Written>, InitError> {
    let [ca, root, manifest, audit] = std::array::from_fn(|_| key::generate());
    let private = |name: &str, key: &SigningKey, what| {
        let file = Written::new(dir.join(name), what).with_key(&PublicKey::of(key));
        files::write(file, &key::to_pem(key), files::PRIVATE)
    };
    let made = x509::authority(fleet, &ca, x509::serial(rand::random()), now)
        .map_err(InitError::Certificate)?;
    let set = KeySet {
        fleet: fleet.clone(),
        version: 1,
        epoch: Epoch(1),
        issued: now,
        root: PublicKey::of(&root),
        manifest: vec![PublicKey::of(&manifest)],
        audit: vec![PublicKey::of(&audit)],
    };
    let charter = Charter {
        fleet: fleet.clone(),
        hosts: Vec::new(),
    };
    let certificate = Written::new(dir.join(fleet::CA), "certificate of the CA")
        .with_certificate(&made.certificate);
    Ok(vec![
        private(fleet::ROOT_KEY, &root, "root key: signs the key set")?,
        private(
            fleet::CA_KEY,
            &ca,
            "CA key: signs certificates and revocations",
        )?,
        private(
            fleet::MANIFEST_KEY,
            &manifest,
            "manifest key: signs what is published",
        )?,
        private(
            fleet::AUDIT_KEY,
            &audit,
            "audit key: signs the master's log",
        )?,
        fleet::write_keys(dir, set, &root)?,
        files::write(certificate, &made.pem, files::PUBLIC)?,
        charter.write(dir)?,
    ])
}
