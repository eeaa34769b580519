//! What operators ask of the running agent. Nothing that can be asked changes anything, so who may
//! open the socket may ask: root, the agent's user, and its group.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clamcast_daemon::admin::{AdminError, Finish, Listener, Session};
use clamcast_daemon::exit;
use clamcast_daemon::service::Occasion;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::chain;
use crate::clamd::Prover;
use crate::install::{HostStorage, Installer};
use crate::keeper::Question;
use crate::operate::status::Verification;

/// Commands served at a time.
const SESSIONS_MAX: usize = 16;

/// A clamd that has not answered by then is shown as it was seen last.
const LOOK_TIME: Duration = Duration::from_secs(3);

/// A command that is under way when the agent stops is answered if it takes no longer: a `status`
/// beside a clamd that answers.
const LAST_ANSWER_TIME: Duration = Duration::from_secs(1);

/// A command.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// The agent at this moment.
    Status,
    /// Re-hash the database directory.
    Verify,
}

/// What commands are answered from.
pub struct Commands {
    /// Asks the keeper.
    pub questions: mpsc::Sender<Question>,
    /// Knows the disk.
    pub installer: Installer<HostStorage, Prover>,
    /// Knows clamd.
    pub prover: Prover,
    /// One reads the disk at a time.
    pub reading: Mutex<()>,
    /// Ends what is under way.
    pub stop: CancellationToken,
    /// Why it ends, once it does.
    pub ending: Arc<OnceLock<Occasion>>,
}

/// Serves operators until the agent stops; the sessions that are under way are told so. Returns the
/// socket.
pub async fn serve(mut listener: Listener, commands: Commands) -> Listener {
    let commands = Arc::new(commands);
    let stop = commands.stop.clone();
    let answer = move |session| {
        let commands = commands.clone();
        async move { commands.answer(session).await }
    };
    let mut sessions = listener.serve(SESSIONS_MAX, &stop, answer).await;
    while sessions.join_next().await.is_some() {}
    listener
}

impl Commands {
    async fn answer(&self, session: Session) -> Result<(), AdminError> {
        let finish = match session.request() {
            Ok(request) => tokio::select! {
                biased;
                finish = self.result(request) => finish,
                () = self.ended() => self.ending(),
            },
            Err(error) => Finish::because(exit::USAGE, chain(&error)),
        };
        session.finish(finish).await
    }

    /// Returns when what has been begun is not waited for any more.
    async fn ended(&self) {
        self.stop.cancelled().await;
        tokio::time::sleep(LAST_ANSWER_TIME).await;
    }

    async fn result(&self, request: Request) -> Finish {
        match request {
            Request::Status => self.status().await,
            Request::Verify => self.verify().await,
        }
    }

    fn ending(&self) -> Finish {
        let ending = self.ending.get().copied();
        ending.unwrap_or(Occasion::Exit).finish()
    }

    async fn status(&self) -> Finish {
        // Brings up to date what the keeper then tells of clamd.
        let _ = tokio::time::timeout(LOOK_TIME, self.prover.look()).await;
        let (question, answer) = oneshot::channel();
        let asked = self.questions.send(Question::Status(question)).await;
        match (asked, answer.await) {
            (Ok(()), Ok(status)) => Finish::done(status),
            (Err(_), _) | (_, Err(_)) => self.ending(),
        }
    }

    async fn verify(&self) -> Finish {
        let _one = self.reading.lock().await;
        let installer = self.installer.clone();
        let checked = tokio::task::spawn_blocking(move || {
            let installed = installer.installed();
            let position = installed.map(|installed| installed.set.manifest.position());
            Verification::new(position, installer.verify())
        });
        let verification = checked.await.expect("reading does not panic");
        let exit = if verification.ok {
            exit::DONE
        } else {
            exit::NOT_CONFORMANT
        };
        Finish {
            exit,
            ..Finish::done(verification)
        }
    }
}
