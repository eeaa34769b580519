//! Threads of a running process that stand still.

use std::fs;
use std::sync::mpsc;
use std::thread;

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The threads of a process whose names begin with `name`, in the order in which they began.
///
/// # Panics
///
/// If the process has ended.
pub fn threads(process: u32, name: &str) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process runs");
    let ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    let mut ids: Vec<u32> = ids
        .filter(|id| {
            // A thread may end meanwhile.
            let comm = fs::read_to_string(format!("/proc/{process}/task/{id}/comm"));
            comm.is_ok_and(|comm| comm.starts_with(name))
        })
        .collect();
    ids.sort_unstable();
    ids
}

/// Stops a thread, and no other thread of its process, until its process ends. This process traces
/// it for that.
///
/// # Panics
///
/// If this process may not trace it.
pub fn freeze(thread: u32) {
    let id = Pid::from_raw(i32::try_from(thread).expect("Linux counts no further"));
    let (stopped, stops) = mpsc::channel();
    // The kernel knows the tracer by its thread. A thread that ended stays until its tracer has
    // waited for it, and so does its process.
    thread::spawn(move || {
        ptrace::seize(id, Options::empty()).expect("root may trace");
        ptrace::interrupt(id).expect("it is traced");
        let all = Some(WaitPidFlag::__WALL);
        let status = waitpid(id, all).expect("it is traced");
        stopped.send(status).expect("somebody waits for it");
        while matches!(
            waitpid(id, all),
            Ok(WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..))
        ) {}
    });
    let status = stops.recv().expect("the thread stops");
    assert!(matches!(status, WaitStatus::PtraceEvent(..)), "{status:?}");
}
