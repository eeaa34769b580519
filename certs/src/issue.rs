//! `clamcast-certs master` and `clamcast-certs agent`: certificates, and what comes with them.

use std::fs;
use std::path::{Path, PathBuf};

use clamcast_daemon::exit;
use clamcast_proto::dsse::PublicKey;
use clamcast_proto::identity::{Certificate, GROUPS_MAX, Identity, Role};
use clamcast_proto::{AgentName, FleetName, GroupName};
use jiff::Timestamp;

use crate::files::{self, WriteError, Written};
use crate::fleet::{self, Charter, Fleet, OpenError};
use crate::host::Host;
use crate::x509::Made;
use crate::{key, x509};

/// Hosts of one master. Agents try them one after the other, so more would only delay.
pub const HOSTS_MAX: usize = 16;

/// What was issued.
#[derive(Debug)]
pub struct Issued {
    /// The new certificate.
    pub certificate: Certificate,
    /// The directory that goes to the host.
    pub bundle: PathBuf,
    /// What was written there.
    pub files: Vec<Written>,
    /// Certificates that the holder got before and that still count.
    pub earlier: Vec<Certificate>,
    /// Where the `agent.toml` went that stood there and said something else.
    pub saved: Option<PathBuf>,
    /// Hosts that the master had before and has no more.
    pub left: Vec<Host>,
}

/// Why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The fleet's directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The master has no name.
    #[error("no --host given: name the master as agents reach it, by DNS name or IP address")]
    NoHost,
    /// More hosts than anyone needs.
    #[error("{found} hosts given, a master has at most {HOSTS_MAX}")]
    Hosts {
        /// How many.
        found: usize,
    },
    /// More groups than a certificate holds.
    #[error("{found} groups given, an agent has at most {GROUPS_MAX} in its certificate")]
    Groups {
        /// How many.
        found: usize,
    },
    /// Agents would not know where the master is.
    #[error(
        "the master has no certificate yet, so the agent could not be told where it is; first \
         `clamcast-certs master --dir {dir} --host NAME_OR_IP`"
    )]
    NoMaster {
        /// The fleet's directory.
        dir: PathBuf,
    },
    /// Something would be overwritten.
    #[error(
        "{path} is there, nothing was changed; --force issues {holder} a new key and certificate \
         and writes its files again"
    )]
    Standing {
        /// The file in the way.
        path: PathBuf,
        /// Whose.
        holder: String,
    },
    /// The name is in use.
    #[error(
        "{holder} has a certificate that counts until {not_after}, and no two hosts may have one \
         name; --force issues another one, `clamcast-certs revoke` withdraws the one it has"
    )]
    Valid {
        /// Whose.
        holder: String,
        /// Until when.
        not_after: Timestamp,
    },
    /// The CA has expired.
    #[error(
        "the CA's certificate {path} expired at {not_after}; the fleet needs a new CA \
         (`clamcast-certs init --force`), or this host's clock is wrong"
    )]
    AuthorityExpired {
        /// The certificate.
        path: PathBuf,
        /// When.
        not_after: Timestamp,
    },
    /// A file could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The certificate could not be made.
    #[error("cannot make the certificate of {holder}")]
    Certificate {
        /// Whose.
        holder: String,
        /// Why.
        source: rcgen::Error,
    },
}

impl IssueError {
    /// The exit code of a command that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Open(error) => error.exit_code(),
            Self::NoHost
            | Self::Hosts { .. }
            | Self::Groups { .. }
            | Self::NoMaster { .. }
            | Self::Standing { .. }
            | Self::Valid { .. } => exit::USAGE,
            Self::AuthorityExpired { .. } | Self::Write(_) | Self::Certificate { .. } => {
                exit::FAILED
            }
        }
    }
}

const KEY: &str = "key.pem";
const CA: &str = "ca.pem";
const KEYS: &str = "manifest.pub";
const AGENT_TOML: &str = "agent.toml";

/// Issues the master's certificate for `hosts`, and keeps them for the agents' configuration.
pub fn issue_master(
    dir: &Path,
    hosts: &[Host],
    force: bool,
    now: Timestamp,
) -> Result<Issued, IssueError> {
    let (fleet, _guard) = Fleet::open_to_write(dir)?;
    let hosts = without_repeats(hosts);
    match hosts.len() {
        0 => return Err(IssueError::NoHost),
        1..=HOSTS_MAX => {}
        found => return Err(IssueError::Hosts { found }),
    }
    let mut issued = issue(
        &fleet,
        Role::Master,
        &hosts,
        &[KEY, fleet::CERTIFICATE],
        force,
        now,
    )?;
    let before = fleet.charter.hosts;
    issued.left = before
        .into_iter()
        .filter(|host| !hosts.contains(host))
        .collect();
    let fleet = fleet.charter.fleet;
    let charter = Charter { fleet, hosts };
    charter.write(dir)?; // last: with hosts there is a master
    Ok(issued)
}

/// Issues an agent's certificate, and writes the bundle that its host needs to run it.
pub fn issue_agent(
    dir: &Path,
    name: &AgentName,
    groups: &[GroupName],
    force: bool,
    now: Timestamp,
) -> Result<Issued, IssueError> {
    let (fleet, _guard) = Fleet::open_to_write(dir)?;
    let groups = without_repeats(groups);
    if groups.len() > GROUPS_MAX {
        let found = groups.len();
        return Err(IssueError::Groups { found });
    }
    let hosts = &fleet.charter.hosts;
    if hosts.is_empty() {
        return Err(IssueError::NoMaster { dir: dir.into() });
    }
    let (set, keys) = fleet.keys()?;
    let toml = agent_toml(&fleet.charter.fleet, name, hosts);
    let names = [KEY, fleet::CERTIFICATE, CA, KEYS, AGENT_TOML];
    let name = name.clone();
    let role = Role::Agent { name, groups };
    let mut issued = issue(&fleet, role, &[], &names, force, now)?;

    let path = |name| issued.bundle.join(name);
    issued.saved = save_other(&path(AGENT_TOML), &toml)?;
    let company = [
        (
            Written::new(path(CA), "certificate of the CA").with_certificate(&fleet.ca),
            &fleet.ca_pem,
        ),
        (
            Written::new(path(KEYS), "key set: what it trusts, by its root key")
                .with_key(&set.root),
            &keys,
        ),
        (
            Written::new(path(AGENT_TOML), "configuration of the agent"),
            &toml,
        ),
    ];
    for (file, text) in company {
        issued.files.push(files::write(file, text, files::PUBLIC)?);
    }
    Ok(issued)
}

/// Makes and writes key and certificate of `role`, in a directory where none of `names` may be
/// without `force`.
fn issue(
    fleet: &Fleet,
    role: Role,
    hosts: &[Host],
    names: &[&str],
    force: bool,
    now: Timestamp,
) -> Result<Issued, IssueError> {
    let holder = match &role {
        Role::Master => "the master".to_owned(),
        Role::Agent { name, .. } => format!("agent `{name}`"),
    };
    let bundle = fleet.bundle_path(&role);
    let earlier = counting(fleet, &role, now)?;
    if !force {
        let mut paths = names.iter().map(|name| bundle.join(name));
        if let Some(path) = paths.find(|path| files::is_there(path)) {
            return Err(IssueError::Standing { path, holder });
        }
        if let Some(last) = earlier.last() {
            let not_after = last.not_after;
            return Err(IssueError::Valid { holder, not_after });
        }
    }
    if fleet.ca.not_after <= now {
        let (path, not_after) = (fleet.dir.join(fleet::CA), fleet.ca.not_after);
        return Err(IssueError::AuthorityExpired { path, not_after });
    }

    let copies = fleet.issued_path(&role);
    let identity = Identity {
        fleet: fleet.charter.fleet.clone(),
        role,
    };
    let key = key::generate();
    let serial = x509::serial(rand::random());
    let Made { pem, certificate } = fleet
        .authority()?
        .issue(&identity, hosts, &key, serial, now)
        .map_err(|source| IssueError::Certificate { holder, source })?;
    let describe = |path: PathBuf| Written::new(path, "certificate").with_certificate(&certificate);
    // The copy comes first: whatever certificate may have left the CA can be revoked.
    let copy = copies.join(format!("{}.pem", certificate.serial));
    files::write(describe(copy), &pem, files::PUBLIC)?;
    let private = Written::new(bundle.join(KEY), "private key").with_key(&PublicKey::of(&key));
    let files = vec![
        files::write(private, &key::to_pem(&key), files::PRIVATE)?,
        files::write(
            describe(bundle.join(fleet::CERTIFICATE)),
            &pem,
            files::PUBLIC,
        )?,
    ];
    Ok(Issued {
        certificate,
        bundle,
        files,
        earlier,
        saved: None,
        left: Vec::new(),
    })
}

/// The certificates of a holder that the master would still accept.
fn counting(fleet: &Fleet, role: &Role, now: Timestamp) -> Result<Vec<Certificate>, OpenError> {
    let mut issued = fleet.issued(role)?;
    if !issued.is_empty() {
        let revoked = fleet.revoked()?;
        let is_revoked = |c: &Certificate| revoked.as_ref().is_some_and(|r| r.entry(c).is_some());
        issued.retain(|certificate| certificate.not_after > now && !is_revoked(certificate));
    }
    Ok(issued)
}

/// Moves a file aside that differs from the text about to replace it: somebody may have put work
/// into it.
fn save_other(path: &Path, text: &str) -> Result<Option<PathBuf>, WriteError> {
    if !files::is_there(path) || files::has(path, text) {
        return Ok(None);
    }
    let saved = path.with_extension("toml.old");
    match fs::rename(path, &saved) {
        Ok(()) => Ok(Some(saved)),
        Err(source) => Err(WriteError {
            path: saved,
            source,
        }),
    }
}

/// The list without later repeats, in the order given.
fn without_repeats<T: Clone + PartialEq>(list: &[T]) -> Vec<T> {
    let mut once = Vec::new();
    for item in list {
        if !once.contains(item) {
            once.push(item.clone());
        }
    }
    once
}

/// A configuration that runs as it is, with what is commonly changed in comments: each commented
/// key shows its default, and the line counts once its `# ` is taken away.
fn agent_toml(fleet: &FleetName, name: &AgentName, hosts: &[Host]) -> String {
    let master: Vec<String> = hosts
        .iter()
        .map(|host| format!("\"{}\"", host.with_port()))
        .collect();
    let master = master.join(", ");
    format!(
        r#"# Agent {name} of fleet {fleet}. To run it: systemctl enable --now clamcast-agent
# Paths are relative to this file. Keys behind a # have the defaults shown.

master = [{master}]     # addresses of the one master, tried in order
state = "/var/lib/clamcast/agent"

[tls]
ca = "ca.pem"
cert = "cert.pem"
key = "key.pem"

[trust]
keys = "manifest.pub"       # its root key is pinned; newer key sets come over the wire
# stale = "warn"            # no fresh word from the master for longer than promised: warn | refuse

[listen]
# admin = "/run/clamcast/agent.sock"

[database]
path = "/var/lib/clamav"
# drift = "repair"          # repair | report
# rescan = "1h"

[clamd]
# config = "auto"           # where clamd.conf is; "" to use only what stands here
# socket = ["/run/clamav/clamd.ctl"]    # a path or "host:port"; "none": there is no clamd here
# reload = "socket"         # socket | signal
# pid_file = "/run/clamav/clamd.pid"    # for reload = "signal"
# proof = "canary"          # canary | version
# deadline = "5m"
# splay = "0s"              # wait a random part of this before the reload
"#
    )
}
