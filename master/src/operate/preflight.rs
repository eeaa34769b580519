//! Tries what a start would do, without doing it: the obstacles that the daemon would not start over,
//! and the doubts, over which it would.

use std::fs::{self, File};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use clamcast_daemon::clamscan;
use clamcast_daemon::input::{self, this_user, user_name};
use clamcast_proto::identity::Certificate;
use clamcast_proto::names::looks_like_a_database;
use jiff::{SignedDuration, Timestamp};
use nix::unistd::{AccessFlags, Group, Uid, access};
use serde::{Deserialize, Serialize};

use crate::config::{self, Config, LoadTest, Wave};
use crate::fleet::agents::{CANARIES_MIN, Record, ThinVersion, thin_versions};
use crate::link::endpoint::{self, EndpointError};
use crate::link::revocations;
use crate::publish::check;
use crate::publish::mirror::listing::ENTRIES_MAX;
use crate::record::recorder;

/// A certificate that ends sooner than this is to be renewed.
pub const CERTIFICATE_ENDS_SOON: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Where the socket unit of the package may be, the one that counts first.
const SOCKET_UNITS: [&str; 3] = [
    "/etc/systemd/system/clamcast-master.socket",
    "/usr/lib/systemd/system/clamcast-master.socket",
    "/lib/systemd/system/clamcast-master.socket",
];

/// Longest unit that is read, in bytes.
const UNIT_BYTES_MAX: u64 = 64 << 10;

/// Where a master that runs has its state and listens: these are taken by it, and good.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Running {
    /// The state directory.
    pub state: PathBuf,
    /// Where agents connect, as configured.
    pub quic: SocketAddr,
    /// The operators' socket.
    pub admin: PathBuf,
}

impl From<&Config> for Running {
    fn from(config: &Config) -> Self {
        Self {
            state: config.state.clone(),
            quic: config.listen.quic,
            admin: config.listen.admin.clone(),
        }
    }
}

/// Reads every key and certificate that the daemon needs, and returns all that is wrong with them.
pub fn unreadable(config: &Config) -> Vec<anyhow::Error> {
    let signing = &config.signing;
    let mut errors = Vec::new();
    match config::load_keys("signing.keys", &signing.keys) {
        Err(error) => errors.push(error.into()),
        Ok(keys) => {
            errors.extend(config::check_fleet(config, &keys).err().map(Into::into));
            errors.extend(
                config::load_manifest_key(signing, &keys)
                    .err()
                    .map(Into::into),
            );
            errors.extend(config::load_audit_key(signing, &keys).err().map(Into::into));
        }
    }
    let tls = endpoint::server_config(&config.tls, &config.fleet);
    errors.extend(tls.err().map(Into::into));
    errors
}

/// Returns a sentence for each thing outside of the key files that a start would fail on, with the
/// next step; or, if a master is `running`, that a reload would. Of a process that has read several
/// configurations any may be the one that it runs with.
pub fn obstacles(config: &Config, running: &[Running]) -> Vec<String> {
    let mut obstacles = Vec::new();
    if running.iter().all(|running| running.state != config.state) {
        obstacles.extend(state_obstacles(config));
    }
    if running
        .iter()
        .all(|running| running.admin != config.listen.admin)
    {
        obstacles.extend(admin_obstacles(&config.listen.admin));
    }
    let address = config.listen.quic;
    if running.iter().all(|running| running.quic != address)
        && let Err(source) = UdpSocket::bind(address)
    {
        let error = EndpointError::Bind { address, source };
        obstacles.push(crate::chain(&error));
    }
    obstacles
}

fn state_obstacles(config: &Config) -> Vec<String> {
    let mut obstacles = Vec::new();
    obstacles.extend(directory("state", &config.state));
    if is_locked(&config.state.join("lock")) {
        obstacles.push(format!(
            "state: another master runs on {}, and one at a time may; stop it, or name another directory",
            config.state.display()
        ));
    }
    obstacles
}

fn admin_obstacles(admin: &Path) -> Vec<String> {
    let mut obstacles = Vec::new();
    if UnixStream::connect(admin).is_ok() {
        obstacles.push(format!(
            "listen.admin: another daemon answers at {}; stop it, or name another path",
            admin.display()
        ));
    }
    if !is_made_by_systemd(admin) {
        obstacles.extend(
            admin
                .parent()
                .and_then(|above| directory("listen.admin", above)),
        );
    }
    if fs::symlink_metadata(admin).is_ok_and(|found| !found.file_type().is_socket()) {
        obstacles.push(format!(
            "listen.admin: {} is there and is no socket; remove it, or name another path",
            admin.display()
        ));
    }
    obstacles
}

/// Whether the socket unit of the package makes this socket. The daemon's user then needs no right to
/// make files in its directory.
fn is_made_by_systemd(admin: &Path) -> bool {
    let line = format!("ListenStream={}", admin.display());
    let units = SOCKET_UNITS.iter().filter_map(|unit| {
        let text = input::whole(Path::new(unit), UNIT_BYTES_MAX).ok()?;
        String::from_utf8(text).ok()
    });
    // The first unit counts (systemd.unit(5)).
    units
        .take(1)
        .any(|text| text.lines().any(|found| found.trim() == line))
}

/// Why files could not be made in the directory `path`, which is made itself if need be.
fn directory(key: &str, path: &Path) -> Option<String> {
    let there = path.ancestors().find(|above| above.exists());
    let there = there.unwrap_or(Path::new("."));
    let (path, above) = (path.display(), there.display());
    if !there.is_dir() {
        return Some(format!("{key}: {above} is no directory; name another path"));
    }
    let all = AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK;
    let error = access(there, all).err()?;
    let user = this_user();
    let owner = fs::metadata(there).map_or(String::new(), |found| {
        let owner = user_name(Uid::from_raw(found.uid()));
        format!("; {above} belongs to `{owner}`")
    });
    Some(format!(
        "{key}: user `{user}` cannot write in {path}: {}{owner}; run this as the daemon's user \
         (`sudo -u clamcast-master ...`), or give the directory to it",
        error.desc()
    ))
}

/// Whether somebody holds the lock file. One that is not there, or not ours to read, is not held.
fn is_locked(path: &Path) -> bool {
    let locked = |file: File| matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock));
    File::open(path).is_ok_and(locked)
}

/// Looks at what the configuration names and returns a sentence for each doubt at the time `now`,
/// with the next step.
pub fn doubts(config: &Config, now: Timestamp) -> Vec<String> {
    let mut doubts = mirror_doubts(config);
    let group = &config.listen.admin_group;
    if matches!(Group::from_name(group), Ok(None)) {
        doubts.push(format!(
            "there is no group `{group}` (listen.admin_group): only root and the daemon's own user \
             may command it; `groupadd --system {group}`"
        ));
    }
    let signing = &config.signing;
    for key in [&signing.manifest_key, &signing.audit_key, &config.tls.key] {
        if fs::metadata(key).is_ok_and(|found| found.mode() & 0o077 != 0) {
            let key = key.display();
            doubts.push(format!(
                "others may read the private key {key}; `chmod 600 {key}`"
            ));
        }
    }
    // A CA that cannot be read is an error, told elsewhere.
    if let Ok((_, ca)) = endpoint::load_ca(&config.tls.ca) {
        doubts.extend(revocations::objection(
            &config.tls.revoked,
            &config.fleet,
            &ca.key,
        ));
        doubts.extend(date_doubt("tls.ca", &config.tls.ca, &ca, CA_NEXT, now));
    }
    if let Ok((_, own)) = endpoint::server_config(&config.tls, &config.fleet) {
        doubts.extend(date_doubt(
            "tls.cert",
            &config.tls.cert,
            &own,
            CERT_NEXT,
            now,
        ));
    }
    if config.mirror.load_test == LoadTest::Always && clamscan::find().is_none() {
        doubts.push(
            "mirror.load_test is \"always\" and there is no clamscan on this host: nothing would be \
             published; install clamav, or set it to \"auto\""
                .to_owned(),
        );
    }
    if config.mirror.load_test != LoadTest::Never && clamscan::find().is_some() {
        doubts.extend(check::gaps());
    }
    doubts.extend(canary_doubts(config));
    doubts.extend(endpoint::receive_buffer_doubt());
    let state = &config.state;
    if state.join("mark.json").exists() && !state.join("generations").exists() {
        doubts.push(format!(
            "state: {} is an agent's state directory; name another one",
            state.display()
        ));
    }
    doubts
}

/// A wave of a group that nobody is known to be in passes by.
fn canary_doubts(config: &Config) -> Vec<String> {
    // Without a fleet there is nothing to say yet; a damaged record is told of at the start.
    let records = recorder::load(&config.state.join("agents")).unwrap_or_default();
    let groups_of = |record: &Record| config.groups.of(record.name.as_str(), &record.groups);
    let groups: Vec<_> = records.iter().flat_map(groups_of).collect();
    let waves = config.rollout.waves.iter().filter_map(|wave| match wave {
        Wave::Group(group) => Some(group),
        Wave::Share(_) | Wave::Count(_) => None,
    });
    let empty = waves.filter(|group| !records.is_empty() && !groups.contains(group));
    let mut doubts: Vec<_> = empty
        .map(|group| {
            format!(
                "rollout.waves has \"group:{group}\", and no agent was ever in that group: the wave \
                 is passed over; name agents under [groups], or make certificates with \
                 `clamcast-certs agent --group {group}`"
            )
        })
        .collect();
    if let Some(Wave::Group(canary)) = config.rollout.waves.first() {
        let records: Vec<_> = records
            .iter()
            .cloned()
            .map(|mut record| {
                record.groups = groups_of(&record);
                record
            })
            .collect();
        for thin in thin_versions(records.iter(), canary) {
            let ThinVersion {
                version,
                canaries,
                hosts,
                one,
            } = thin;
            doubts.push(format!(
                "rollout.waves: hosts with {version}: {canaries} in group `{canary}`, {hosts} others \
                 ({one}); with {CANARIES_MIN} in the group no single host decides for that version"
            ));
        }
    }
    doubts
}

/// What keeps the mirror from being published: nobody there, nothing in it, or no right to read.
fn mirror_doubts(config: &Config) -> Vec<String> {
    let mirror = &config.mirror.path;
    let shown = mirror.display();
    let names: Vec<String> = match input::names(mirror, ENTRIES_MAX) {
        Ok(names) => names
            .into_iter()
            .map(|name| name.to_string_lossy().into_owned())
            .filter(|name| looks_like_a_database(name))
            .collect(),
        Err(error) => {
            let user = this_user();
            return vec![format!(
                "mirror.path: user `{user}` cannot list {shown} ({error}); nothing is published until \
                 it can: name the directory that freshclam writes"
            )];
        }
    };
    let mut doubts = Vec::new();
    for base in &config.mirror.require {
        let is_base = |name: &String| name.rsplit_once('.').is_some_and(|(stem, _)| stem == base);
        if !names.iter().any(is_base) {
            doubts.push(format!(
                "mirror.require: there is no `{base}` in {shown}, and nothing is published without; \
                 run freshclam, or take it out of the list"
            ));
        }
    }
    let unreadable = |name: &&String| access(&mirror.join(name), AccessFlags::R_OK).is_err();
    if let Some(name) = names.iter().find(unreadable) {
        let user = this_user();
        doubts.push(format!(
            "mirror.path: user `{user}` may not read {}; `chmod a+r`, or run this as the daemon's user",
            mirror.join(name).display()
        ));
    }
    doubts
}

const CA_NEXT: &str = "the fleet needs a new CA";
const CERT_NEXT: &str = "make a new one with `clamcast-certs master --force`";

/// What the dates of a certificate mean at the time `now`, if anything.
fn date_doubt(
    key: &str,
    path: &Path,
    certificate: &Certificate,
    next: &str,
    now: Timestamp,
) -> Option<String> {
    let (path, begins, ends) = (
        path.display(),
        certificate.not_before,
        certificate.not_after,
    );
    if begins > now {
        Some(format!(
            "{key}: {path} counts only from {begins}, so no agent can connect; set this host's clock"
        ))
    } else if ends < now {
        Some(format!(
            "{key}: {path} expired at {ends}, so no agent can connect; {next}, or set this host's clock"
        ))
    } else if ends.duration_since(now) < CERTIFICATE_ENDS_SOON {
        Some(format!("{key}: {path} expires at {ends}; {next}"))
    } else {
        None
    }
}
