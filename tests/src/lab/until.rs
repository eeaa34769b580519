//! Waiting for a condition instead of for a while.

use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait for what normally takes a moment: enough for a busy machine, and reached only
/// by a test that fails anyway.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Often enough that nobody notices, seldom enough that two cores do.
const POLL: Duration = Duration::from_millis(20);

/// What a polled condition may answer: `bool`, `Option` or `Result`, whose error is the state that
/// is shown when the time is over.
pub trait Answer {
    /// What is known once the condition holds.
    type Value;
    /// The value, or the state in which it does not hold yet.
    fn answer(self) -> Result<Self::Value, String>;
}

impl Answer for bool {
    type Value = ();
    fn answer(self) -> Result<(), String> {
        self.then_some(()).ok_or_else(|| "it is false".into())
    }
}

impl<T> Answer for Option<T> {
    type Value = T;
    fn answer(self) -> Result<T, String> {
        self.ok_or_else(|| "there is none".into())
    }
}

impl<T, E: Debug> Answer for Result<T, E> {
    type Value = T;
    fn answer(self) -> Result<T, String> {
        self.map_err(|state| format!("{state:?}"))
    }
}

/// Polls `condition` until it holds, and returns what it then knows.
///
/// # Panics
///
/// After `timeout`, with `what` and the last state.
#[track_caller]
pub fn until<A: Answer>(
    timeout: Duration,
    what: &str,
    mut condition: impl FnMut() -> A,
) -> A::Value {
    let deadline = Instant::now() + timeout;
    loop {
        match condition().answer() {
            Ok(value) => return value,
            Err(state) if deadline <= Instant::now() => late(timeout, what, &state),
            Err(_) => thread::park_timeout(POLL),
        }
    }
}

/// [`until`] for an asynchronous condition; the runtime goes on between two looks.
///
/// # Panics
///
/// After `timeout`, with `what` and the last state. A condition that does not return is over with
/// the timeout, too.
pub async fn until_async<A: Answer>(
    timeout: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> A,
) -> A::Value {
    let mut last = "the condition did not return".to_owned();
    let mut ticks = tokio::time::interval(POLL);
    let waited = tokio::time::timeout(timeout, async {
        loop {
            ticks.tick().await;
            match condition().await.answer() {
                Ok(value) => return value,
                Err(state) => last = state,
            }
        }
    })
    .await;
    waited.unwrap_or_else(|_| late(timeout, what, &last))
}

/// Passes the time between two changes of a program whose part a test takes. To wait for an event, use
/// [`until`].
pub fn pace(time: Duration) {
    thread::park_timeout(time);
}

#[track_caller]
fn late(timeout: Duration, what: &str, state: &str) -> ! {
    panic!("not within {timeout:?}: {what}; last: {state}")
}
