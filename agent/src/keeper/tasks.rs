//! Carries out the tasks of the core with the installer. Each is a future that ends with an event.

use std::pin::Pin;

use tokio_util::sync::CancellationToken;

use crate::core::{Cut, Event, Looked, Task};
use crate::install::{Installer, Prove, Storage};

/// A task under way.
pub type Running = Pin<Box<dyn Future<Output = Event> + Send>>;

/// Begins tasks, and breaks them off.
pub struct Tasks<S, P> {
    installer: Installer<S, P>,
    stop: CancellationToken,
    transfers: CancellationToken,
    probe: CancellationToken,
    look: CancellationToken,
    repair: CancellationToken,
}

impl<S: Storage, P: Prove> Tasks<S, P> {
    /// Tasks of this installer. All end when `stop` fires.
    pub fn new(installer: Installer<S, P>, stop: CancellationToken) -> Self {
        Self {
            installer,
            transfers: stop.child_token(),
            probe: stop.child_token(),
            look: stop.child_token(),
            repair: stop.child_token(),
            stop,
        }
    }

    /// Fires when the transfers that begin now are broken off.
    pub fn transfers(&self) -> CancellationToken {
        self.transfers.clone()
    }

    /// Breaks off the running tasks of this kind. Later ones are not affected.
    pub fn cut(&mut self, cut: Cut) {
        let token = match cut {
            Cut::Transfers => &mut self.transfers,
            Cut::Probe => &mut self.probe,
            Cut::Look => &mut self.look,
            Cut::Repair => &mut self.repair,
        };
        token.cancel();
        *token = self.stop.child_token();
    }

    /// Begins a task.
    pub fn begin(&self, task: Task) -> Running {
        let installer = self.installer.clone();
        let stop = match &task {
            Task::Probe { .. } => self.probe.clone(),
            Task::Look(_) => self.look.clone(),
            Task::Repair => self.repair.clone(),
            Task::Plan(..)
            | Task::Install(_)
            | Task::Resume
            | Task::Fault(..)
            | Task::Ping
            | Task::Scan => self.stop.clone(),
        };
        Box::pin(async move {
            match task {
                Task::Plan(job, full) => {
                    let plan = installer.plan(&job.manifest, job.forced, full, stop);
                    let (wrong, planned) = plan.await;
                    Event::Planned(wrong, planned)
                }
                Task::Install(job) => {
                    let install = installer.install(&job.manifest, job.forced, stop);
                    let completed = Box::new(install.await);
                    Event::Installed(job, completed)
                }
                Task::Resume => Event::Resumed(installer.resume(stop).await.map(Box::new)),
                Task::Fault(job, fault) => {
                    let completed = installer.host_fault(&job.manifest, &fault).await;
                    Event::Faulted(job, Box::new(completed))
                }
                Task::Ping => {
                    stop.run_until_cancelled(installer.ping()).await;
                    Event::Pinged(installer.clamd())
                }
                Task::Probe { unproven: true } => {
                    Event::Probed(installer.probe_on(stop).await.map(Box::new))
                }
                Task::Probe { unproven: false } => {
                    Event::Probed(installer.look_at_clamd(stop).await.map(Box::new))
                }
                Task::Look(depth) => {
                    let (look, updater) = installer.look(depth, stop).await;
                    Event::Looked(Box::new(Looked {
                        depth,
                        look,
                        updater,
                        clamd: installer.clamd(),
                    }))
                }
                Task::Scan => Event::Scanned(installer.updater().await),
                Task::Repair => {
                    let repaired = installer.repair(stop).await;
                    Event::Repaired(repaired.map(|it| it.map(Box::new)), installer.clamd())
                }
            }
        })
    }
}
