//! `configuration`: the files that operators write.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;

use clamcast_agent::clamd::ClamdConf;
use clamcast_agent::config::Config as AgentConfig;
use clamcast_daemon::config::ConfigError;
use clamcast_master::config::Config as MasterConfig;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::render;

/// Longest message of an error, in bytes: a few lines on a terminal.
const ERROR_BYTES_MAX: usize = 2000;

thread_local! {
    // In memory: on a disk, a thousand files a second are too many.
    static FILE: RefCell<File> = RefCell::new(File::from(
        memfd_create(c"configuration", MFdFlags::MFD_CLOEXEC).expect("there is memory"),
    ));
}

/// Loads the input as the configuration of either daemon, and parses it as a clamd.conf.
pub fn configuration(bytes: &[u8]) -> bool {
    let conf = ClamdConf::parse(&String::from_utf8_lossy(bytes));
    assert!(conf.tcp_port.is_none() || conf.address().is_some());
    FILE.with_borrow_mut(|file| {
        file.rewind()
            .and_then(|()| file.set_len(0))
            .and_then(|()| file.write_all(bytes))
            .expect("there is memory");
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = Path::new(&path);
        let master = judge(MasterConfig::load(path));
        let agent = judge(AgentConfig::load(path));
        if let Some(master) = &master {
            assert!(!master.rollout.waves.is_empty() && master.keep > 0);
        }
        if let Some(agent) = &agent {
            assert!(!agent.master.is_empty() && !agent.clamd.deadline.is_zero());
        }
        master.is_some() || agent.is_some()
    })
}

/// An error is one line that a terminal can show.
fn judge<T>(loaded: Result<T, ConfigError>) -> Option<T> {
    match loaded {
        Ok(config) => Some(config),
        Err(error) => {
            let text = render(&error);
            assert!(!text.contains(char::is_control), "{text:?}");
            assert!(text.len() <= ERROR_BYTES_MAX, "{} bytes", text.len());
            None
        }
    }
}
