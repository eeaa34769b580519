//! From the mirror to the fleet: publishes when a capture is due, publishes rollbacks, and sends
//! [`News`] of both. One publication at a time, whoever asks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clamcast_daemon::alarms::Alarms;
use clamcast_proto::audit::Draft;
use clamcast_proto::dsse::Envelope;
use clamcast_proto::manifest::Manifest;
use clamcast_proto::{AuditEvent, Digest};
use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::news::{News, Wish};
use super::plan::{Skipped, listed};
use super::publisher::{
    Adoption, Announcement, Hold, Preview, PublishError, Published, Publisher, Refusal,
    RefusalKind, Request,
};
use super::withdrawn::{Rollback, Withdrawal, Withdrawn};
use crate::config::units::UnitName;
use crate::record::entry::Entry;
use crate::record::recorder::Recorder;

/// Time until another try after a failure of our own (a full disk, no memory for the load test).
/// It doubles with each failure that follows.
const RETRY_MIN: Duration = Duration::from_secs(10);

/// And so long at most: a load test that always fails keeps a core busy for minutes.
const RETRY_MAX: Duration = Duration::from_secs(10 * 60);

/// The alarm about publications that fail through no fault of the mirror's: a full disk, a load test
/// that could not run.
const PUBLISHING: &str = "publishing";

/// Held units and skipped files that one publication logs. `status` has all.
const LOGGED_MAX: usize = 20;

/// The alarm about another master with this fleet's manifest key.
pub const TWO_MASTERS: &str = "two-masters";

/// How long `status` shows another master after the last host that reported it.
const OTHER_MASTER_SHOWN: SignedDuration = SignedDuration::from_hours(24);

/// Publishes.
#[derive(Clone, Debug)]
pub struct Pipeline {
    publisher: Arc<Publisher>,
    news: mpsc::Sender<News>,
    recorder: Recorder,
    /// What the audit log has, so that it has each refusal and each held unit once.
    told: Arc<Mutex<Told>>,
    alarms: Alarms,
    stop: CancellationToken,
}

/// What the audit log and the log have of the mirror.
#[derive(Debug)]
struct Told {
    refusal: Option<String>,
    /// The reasons by unit.
    held: BTreeMap<UnitName, String>,
    skipped: Vec<Skipped>,
}

impl Pipeline {
    /// Publishes with `publisher` until `stop`, which ends a publication that is under way.
    pub fn new(
        publisher: Arc<Publisher>,
        news: mpsc::Sender<News>,
        recorder: Recorder,
        alarms: Alarms,
        stop: CancellationToken,
    ) -> Self {
        let told = Told {
            refusal: publisher.refusal().map(|refusal| refusal.to_string()),
            held: reasons(&publisher, Timestamp::now()),
            skipped: publisher.skipped(),
        };
        Self {
            publisher,
            news,
            recorder,
            told: Arc::new(Mutex::new(told)),
            alarms,
            stop,
        }
    }

    /// Captures and publishes now. The audit log has it before any agent hears of it: a crash in
    /// between loses nothing, for a restarted master writes what is missing there ([`recover`])
    /// and then offers what its store has.
    pub async fn publish(&self, request: Request, actor: &str) -> Result<Published, PublishError> {
        // Held to the end, so that the hub hears of generations in their order.
        let mut told = self.told.lock().await;
        let (publisher, stop) = (self.publisher.clone(), self.stop.clone());
        let (asked, by) = (request.clone(), actor.to_owned());
        let publishing = tokio::task::spawn_blocking(move || {
            publisher.publish(&asked, &by, Timestamp::now(), &stop)
        });
        let published = publishing.await.expect("publishing does not panic");
        let failed = published.as_ref().err();
        if !failed.is_some_and(PublishError::is_usage) {
            let trouble = failed.map(|error| crate::chain(error));
            self.alarms
                .set(PUBLISHING, "mirror", trouble, Timestamp::now());
        }
        if published.is_ok() {
            self.tell_left_out(&mut told, actor).await;
        }
        let told = &mut told.refusal;
        match &published {
            Ok(Published::New {
                manifest,
                announcement,
            }) => {
                let position = manifest.position();
                tracing::info!(%position, content = %manifest.content.short(), files = manifest.files.len(), "published");
                self.announce(manifest, announcement).await;
                *told = None;
                let (manifest, supersede) = (manifest.clone(), request.supersede);
                let news = News::Published {
                    manifest,
                    supersede,
                };
                self.tell(news).await;
            }
            Ok(Published::Refused(refusal) | Published::Held(refusal)) => {
                let text = refusal.to_string();
                if told.as_ref() != Some(&text) {
                    tracing::warn!("{text}; the last generation stays");
                    let event = match refusal.kind {
                        RefusalKind::Held => AuditEvent::Held,
                        RefusalKind::Refused => AuditEvent::Refused,
                    };
                    self.note(event, actor, None, json!({ "reason": refusal.reason }))
                        .await;
                    *told = Some(text);
                }
            }
            Ok(Published::Unchanged) => {
                tracing::debug!("the mirror holds what is published");
                *told = None;
            }
            Ok(Published::Busy { reason }) => tracing::debug!(reason, "the mirror is busy"),
            Err(_) => {} // for the caller to tell
        }
        published
    }

    /// Writes down which units are held and which files are skipped, if that is news.
    async fn tell_left_out(&self, told: &mut Told, actor: &str) {
        let skipped = self.publisher.skipped();
        let new = skipped.iter().filter(|it| !told.skipped.contains(it));
        for Skipped { name, reason } in new.take(LOGGED_MAX) {
            tracing::warn!(name, reason, "in the mirror, and not taken");
        }
        told.skipped = skipped;
        let told = &mut told.held;
        let held = reasons(&self.publisher, Timestamp::now());
        let is_news = |(unit, reason): &(&UnitName, &String)| told.get(*unit) != Some(*reason);
        let news: Vec<_> = held.iter().filter(is_news).collect();
        for (unit, reason) in news.iter().take(LOGGED_MAX) {
            tracing::warn!(%unit, "held: {reason}");
        }
        for unit in told.keys().filter(|unit| !held.contains_key(*unit)) {
            tracing::info!(%unit, "no longer held");
        }
        if !news.is_empty() {
            let texts: Vec<_> = news
                .iter()
                .map(|(unit, it)| format!("{unit}: {it}"))
                .collect();
            let reason = listed(texts.iter().map(String::as_str), LOGGED_MAX);
            let units: Vec<_> = held.keys().collect();
            let detail = json!({ "reason": reason, "units": units });
            self.note(AuditEvent::Held, actor, None, detail).await;
        }
        *told = held;
    }

    /// What [`Pipeline::publish`] would do now.
    pub async fn preview(&self, request: Request) -> Result<Preview, PublishError> {
        let _one_at_a_time = self.told.lock().await;
        let (publisher, stop) = (self.publisher.clone(), self.stop.clone());
        let looking = tokio::task::spawn_blocking(move || {
            publisher.preview(&request, Timestamp::now(), &stop)
        });
        looking.await.expect("a preview does not panic")
    }

    /// The units that are held.
    pub fn holds(&self) -> BTreeMap<UnitName, Hold> {
        self.publisher.holds()
    }

    /// Files of the mirror that no generation carries.
    pub fn skipped(&self) -> Vec<Skipped> {
        self.publisher.skipped()
    }

    /// Why the mirror's content is not published at the moment.
    pub fn refusal(&self) -> Option<Refusal> {
        self.publisher.refusal()
    }

    /// The withdrawal that keeps a content from being published, if one does.
    pub fn rejection(&self, content: Digest) -> Option<Withdrawal> {
        self.publisher.rejection(content)
    }

    /// The generations that were taken back.
    pub fn withdrawn(&self) -> Withdrawn {
        self.publisher.withdrawn()
    }

    /// Publishes whenever `wake` says so, or the rollout does, and adopts what a restored master has
    /// forgotten. First it waits for the entry `recovered`, if there is one.
    pub async fn run(
        self,
        recovered: Option<u64>,
        mut wake: mpsc::Receiver<()>,
        again: Arc<Notify>,
        mut forgotten: mpsc::Receiver<Envelope>,
        mut wishes: mpsc::Receiver<Wish>,
    ) {
        if let Some(number) = recovered {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = announced(&self.publisher, &self.recorder, number) => {}
            }
        }
        let mut retry = Retry::default();
        if self.publisher.is_due() {
            self.publish_or_retry(&again, &mut retry).await; // the epoch was raised
        }
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                Some(()) = wake.recv() => self.publish_or_retry(&again, &mut retry).await,
                Some(envelope) = forgotten.recv() => self.adopt(envelope, &again, &mut retry).await,
                () = until(retry.at) => self.publish_or_retry(&again, &mut retry).await,
                Some(wish) = wishes.recv() => match wish {
                    Wish::Look => self.publish_or_retry(&again, &mut retry).await,
                    Wish::RollBack(rollback) => self.roll_back(rollback).await,
                },
            }
        }
    }

    async fn publish_or_retry(&self, again: &Notify, retry: &mut Retry) {
        match self.publish(Request::default(), "master").await {
            Ok(published) => {
                *retry = Retry::default();
                if let Published::Busy { .. } = published {
                    again.notify_one();
                }
            }
            Err(PublishError::Stopping) => {}
            Err(error) => {
                let wait = retry.after_failure(Instant::now());
                tracing::error!(
                    error = crate::chain(&error),
                    "cannot publish; trying again in {wait:?}"
                );
            }
        }
    }

    async fn adopt(&self, envelope: Envelope, again: &Notify, retry: &mut Retry) {
        let publisher = self.publisher.clone();
        let adopting = tokio::task::spawn_blocking(move || publisher.adopt(&envelope));
        match adopting.await.expect("adopting does not panic") {
            Ok(Adoption::Known) => {}
            Ok(Adoption::Restored {
                position,
                publisher,
            }) => {
                tracing::warn!(%position, "an agent has a newer generation than this master knows; going on above it");
                // What was current is no longer to be offered: hosts that took it would refuse what
                // follows, or were ahead of it already.
                self.tell(News::Passed).await;
                self.note(
                    AuditEvent::Restored,
                    "master",
                    Some(position),
                    json!({ "publisher_taken_over": publisher }),
                )
                .await;
                self.publish_or_retry(again, retry).await;
            }
            Ok(Adoption::OtherPublisher {
                position,
                publisher,
            }) => {
                let now = Timestamp::now();
                let id = publisher.0;
                let text = format!(
                    "another master publishes with this fleet's manifest key: a host has its \
                     generation {position} (publisher {id}); stop that master, or raise the epoch \
                     with a new key"
                );
                self.alarms
                    .raise_for(TWO_MASTERS, &id, text, OTHER_MASTER_SHOWN, now);
            }
            Err(error) => tracing::warn!(
                error = crate::chain(&error),
                "an agent's manifest moves nothing"
            ),
        }
    }

    /// Publishes what the rollout owes those who took what was taken back.
    async fn roll_back(&self, rollback: Rollback) {
        let _one_at_a_time = self.told.lock().await;
        if !self.publisher.owes(rollback) {
            return; // an operator ordered another one meanwhile
        }
        let publisher = self.publisher.clone();
        let publishing =
            tokio::task::spawn_blocking(move || publisher.roll_back(rollback, Timestamp::now()));
        let published = publishing.await.expect("publishing does not panic");
        let trouble = published.as_ref().err().map(|error| {
            let error = crate::chain(error);
            format!("the rollback cannot be published: {error}")
        });
        self.alarms
            .set(PUBLISHING, "rollback", trouble, Timestamp::now());
        match published {
            Ok((manifest, announcement)) => {
                tracing::info!(position = %manifest.position(), "published as a rollback");
                if let Some(announcement) = announcement {
                    self.announce(&manifest, &announcement).await;
                }
                self.tell(News::WentBack(manifest)).await;
            }
            // The hub asks again.
            Err(error) => {
                tracing::error!(error = crate::chain(&error), "cannot publish the rollback");
            }
        }
    }

    async fn announce(&self, manifest: &Manifest, announcement: &Announcement) {
        let number = announce(&self.recorder, manifest, announcement, false);
        announced(&self.publisher, &self.recorder, number).await;
    }

    async fn tell(&self, news: News) {
        let _ = self.news.send(news).await; // if the hub has stopped, so has the daemon
    }

    async fn note(
        &self,
        event: AuditEvent,
        actor: &str,
        position: Option<clamcast_proto::Position>,
        detail: serde_json::Value,
    ) {
        let draft = Draft {
            position,
            detail,
            ..Draft::new(event, actor, "mirror")
        };
        let _ = self.recorder.note(draft).await; // an error: the daemon stops
    }
}

/// Writes into the audit log what a process before this one published and did not live to write
/// down. To be called before anything is offered. Returns the number of the entry, for
/// [`Pipeline::run`].
pub fn recover(publisher: &Publisher, recorder: &Recorder) -> Option<u64> {
    let (manifest, announcement) = publisher.unannounced()?;
    tracing::warn!(position = %manifest.position(), "published before the last end, which the audit log did not have");
    Some(announce(recorder, &manifest, &announcement, true))
}

/// Writes into the audit log that a generation was published. Returns the number of the entry.
fn announce(
    recorder: &Recorder,
    manifest: &Manifest,
    announcement: &Announcement,
    recovered: bool,
) -> u64 {
    let files: Vec<_> = manifest
        .files
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    let unsigned: Vec<_> = manifest.unsigned().collect();
    let mut detail = json!({ "content": manifest.content, "files": files, "unsigned": unsigned });
    if !announcement.held.is_empty() {
        detail["held"] = json!(announcement.held);
    }
    if !announcement.accepted.is_empty() {
        detail["accepted"] = json!(announcement.accepted);
        detail["reason"] = json!(announcement.reason);
    }
    if let Some(of) = manifest.rollback_of {
        detail["rollback_of"] = json!(of);
    }
    if recovered {
        detail["recovered"] = json!(true);
    }
    let draft = Draft {
        position: Some(manifest.position()),
        detail,
        ..Draft::new(AuditEvent::Published, &announcement.actor, "mirror")
    };
    recorder.write(Entry::line(draft))
}

/// Why units are held, by unit.
fn reasons(publisher: &Publisher, now: Timestamp) -> BTreeMap<UnitName, String> {
    let held = publisher.holds().into_iter();
    let held = held.filter(|(_, hold)| !hold.is_passing(now));
    held.map(|(unit, hold)| (unit, hold.held.cause.text))
        .collect()
}

/// Marks a publication as written down when its entry is on disk.
async fn announced(publisher: &Arc<Publisher>, recorder: &Recorder, number: u64) {
    if recorder.durable(number).await.is_err() {
        return; // the daemon stops and the disk refuses: for the next process to write
    }
    let publisher = publisher.clone();
    let marking = tokio::task::spawn_blocking(move || publisher.announced());
    if let Err(error) = marking.await.expect("announcing does not panic") {
        tracing::warn!(
            error = crate::chain(&error),
            "cannot mark a generation as written down; the audit log may say twice that it was published"
        );
    }
}

/// When a publication that failed is tried again.
#[derive(Debug, Default)]
struct Retry {
    at: Option<Instant>,
    /// Failures in a row.
    failures: u32,
}

impl Retry {
    fn after_failure(&mut self, now: Instant) -> Duration {
        let wait = RETRY_MIN.saturating_mul(2u32.saturating_pow(self.failures));
        let wait = wait.min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        self.at = Some(now + wait);
        wait
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publish::publisher::Accept;
    use crate::publish::publisher::tests::{Lab, container, key};
    use clamcast_daemon::audit;
    use std::fs;

    /// What the audit log says of publications after a master started on the state directory, and
    /// before it offers anything: `1.2 by tester, recovered, because ...`.
    async fn recovered(lab: &Lab) -> Vec<String> {
        let directory = lab.root.path().join("audit");
        fs::create_dir_all(&directory).unwrap();
        let log = audit::Log::open(&directory, key(3), "clamcast/bank".to_owned()).unwrap();
        let places = crate::record::recorder::Places {
            agents: directory.clone(),
            certificates: directory.clone(),
            state: directory.clone(),
        };
        let (recorder, thread) = Recorder::start(log, places);
        let publisher = Arc::new(lab.publisher("state"));
        if let Some(number) = recover(&publisher, &recorder) {
            announced(&publisher, &recorder, number).await;
        }
        drop(recorder);
        thread.join().unwrap();
        let records = audit::read(&directory).unwrap();
        let text = |record: audit::Record| {
            let position = record.position().unwrap();
            let mut text = format!("{} {position} by {}", record.event, record.actor);
            for (field, value) in record.detail.as_object().unwrap() {
                if !["content", "files", "unsigned"].contains(&field.as_str()) {
                    text += &format!(", {field} {value}");
                }
            }
            text
        };
        records.map(|record| text(record.unwrap())).collect()
    }

    fn publish(lab: &Lab, accept: Option<&str>) {
        let accept = accept.map(|reason| Accept {
            reason: reason.to_owned(),
            units: Vec::new(),
        });
        let request = Request {
            accept,
            supersede: false,
            is_operators: false,
        };
        let (now, stop) = (Timestamp::now(), CancellationToken::new());
        let published = lab
            .publisher("state")
            .publish(&request, "user alice", now, &stop);
        assert!(
            matches!(published, Ok(Published::New { .. })),
            "{published:?}"
        );
    }

    #[tokio::test]
    async fn a_master_killed_between_publishing_and_writing_it_down_writes_it_at_its_next_start() {
        let lab = Lab::with_daily(7);
        publish(&lab, None); // and then it is killed
        let first = "published 1.1 by user alice, recovered true";
        assert_eq!(recovered(&lab).await, [first]);
        assert_eq!(recovered(&lab).await, [first], "once");

        lab.put("daily.cud", &container("daily", 8, 1));
        publish(&lab, Some("it is right"));
        let records = recovered(&lab).await;
        let second = &records[1];
        assert!(
            second.starts_with("published 1.2 by user alice, accepted [\"daily.cud shrank")
                && second.ends_with(", reason \"it is right\", recovered true"),
            "{second}"
        );
    }

    #[tokio::test]
    async fn a_master_killed_before_the_generation_was_on_disk_has_nothing_to_say() {
        let lab = Lab::with_daily(7);
        publish(&lab, None);
        fs::remove_file(lab.root.path().join("state/generations/1-1.json")).unwrap();
        assert_eq!(recovered(&lab).await, [""; 0]);
        publish(&lab, None);
        assert_eq!(recovered(&lab).await.len(), 1);
    }

    #[test]
    fn tries_come_ever_later_but_never_end() {
        let (mut retry, now) = (Retry::default(), Instant::now());
        let waits: Vec<_> = (0..9).map(|_| retry.after_failure(now).as_secs()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        retry.failures = u32::MAX;
        assert_eq!(retry.after_failure(now), RETRY_MAX);
        assert_eq!(retry.at, Some(now + RETRY_MAX));
    }
}
