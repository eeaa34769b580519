//! Sockets that systemd listens at and passes on when it starts the daemon (sd_listen_fds(3)).
//!
//! They are taken once per process and kept until its end, so that a reload finds them again.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::LazyLock;

static PASSED: LazyLock<Vec<UnixListener>> = LazyLock::new(|| match passed() {
    Ok(sockets) => sockets,
    Err(error) => {
        tracing::error!(%error, "cannot use the sockets that systemd passed on");
        Vec::new()
    }
});

/// Takes the sockets before the process starts children, which must not inherit them.
pub fn take() {
    LazyLock::force(&PASSED);
}

/// The socket that systemd listens at under this path, if there is one. Commands that connect to
/// another socket of systemd wait in vain.
pub fn unix_listener(path: &Path) -> Option<io::Result<UnixListener>> {
    let found = find(&PASSED, path);
    if found.is_none() && !PASSED.is_empty() {
        let addresses = PASSED.iter().filter_map(|socket| socket.local_addr().ok());
        let passed: Vec<_> = addresses
            .filter_map(|address| address.as_pathname().map(Path::to_owned))
            .collect();
        tracing::warn!(
            ?passed, configured = %path.display(),
            "the socket unit listens at another path than the configuration; nobody answers there"
        );
    }
    found
}

fn find(sockets: &[UnixListener], path: &Path) -> Option<io::Result<UnixListener>> {
    let is_at = |socket: &&UnixListener| {
        let address = socket.local_addr();
        address.is_ok_and(|address| address.as_pathname() == Some(path))
    };
    sockets.iter().find(is_at).map(UnixListener::try_clone)
}

fn passed() -> io::Result<Vec<UnixListener>> {
    // The variables stay: they name this process, so a child ignores them, and removing them races
    // with threads that read the environment. The call sets FD_CLOEXEC.
    let passed = sd_notify::listen_fds_with_names(false)?;
    Ok(passed.map(|(descriptor, _)| listener(descriptor)).collect())
}

/// Takes ownership of a descriptor that systemd passed on. One that is not a Unix socket has no path,
/// so [`find`] never returns it.
#[expect(
    unsafe_code,
    reason = "systemd passes sockets on by their numbers, and the standard library has no safe way to own them"
)]
fn listener(descriptor: RawFd) -> UnixListener {
    // SAFETY: LISTEN_PID names this process, so systemd opened the descriptor for it, and the call that
    // set FD_CLOEXEC found it open. `PASSED` is the only caller, once per process.
    unsafe { OwnedFd::from_raw_fd(descriptor) }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_found_by_the_path_that_it_is_bound_to() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one.sock", "other.sock"].map(|name| dir.path().join(name));
        let sockets = [&one, &other].map(|path| UnixListener::bind(path).unwrap());
        let found = find(&sockets, &other).unwrap().unwrap();
        assert_eq!(found.local_addr().unwrap().as_pathname(), Some(&*other));
        assert!(find(&sockets, &dir.path().join("third.sock")).is_none());
    }
}
