//! Alarms of a daemon: each stands for as long as its cause lasts.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// Alarms of one name that stand at a time, at most: a disk that loses bits may damage many files, and
/// `status` must stay readable. One more says that there are others.
const OF_ONE_NAME_MAX: usize = 20;

/// The subject of that one.
const OTHERS: &str = "others";

/// Something that an operator should look at.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Alarm {
    /// The kind of alarm, such as `store` or `two-masters`.
    pub name: String,
    /// The object, the reason, and the next step.
    pub text: String,
    /// Since when.
    pub since: Timestamp,
}

/// The alarms of one daemon. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Alarms(Arc<Board>);

#[derive(Debug, Default)]
struct Board {
    standing: Mutex<BTreeMap<Key, Standing>>,
    raised: Notify,
}

/// The name of an alarm, and the object that it is about.
type Key = (&'static str, String);

#[derive(Debug)]
struct Standing {
    alarm: Alarm,
    /// When it ends by itself.
    until: Option<Timestamp>,
    is_new: bool,
}

impl Alarms {
    /// Raises an alarm about `subject`, until [`Alarms::end`]. One that stands keeps its start and
    /// gets the new text.
    pub fn raise(&self, name: &'static str, subject: &str, text: String, now: Timestamp) {
        self.insert(name, subject, text, None, now);
    }

    /// Raises an alarm that ends by itself after `span`: for an event that is over, and that an operator
    /// should know of.
    pub fn raise_for(
        &self,
        name: &'static str,
        subject: &str,
        text: String,
        span: SignedDuration,
        now: Timestamp,
    ) {
        let until = now.saturating_add(span).unwrap_or(Timestamp::MAX);
        self.insert(name, subject, text, Some(until), now);
    }

    fn insert(
        &self,
        name: &'static str,
        subject: &str,
        text: String,
        until: Option<Timestamp>,
        now: Timestamp,
    ) {
        let mut standing = self.standing_at(now);
        let of_one_name = standing.keys().filter(|(other, _)| *other == name).count();
        let mut key = (name, subject.to_owned());
        let mut text = text;
        if of_one_name >= OF_ONE_NAME_MAX && !standing.contains_key(&key) {
            key.1 = OTHERS.to_owned();
            text = "there are more alarms of this kind; the log names them".to_owned();
        }
        if let Some(known) = standing.get_mut(&key) {
            (known.alarm.text, known.until) = (text, until);
            return;
        }
        tracing::error!(alarm = name, "{text}");
        let alarm = Alarm {
            name: name.to_owned(),
            text,
            since: now,
        };
        let is_new = true;
        standing.insert(
            key,
            Standing {
                alarm,
                until,
                is_new,
            },
        );
        self.0.raised.notify_one();
    }

    /// Ends an alarm, if it stands.
    pub fn end(&self, name: &'static str, subject: &str) {
        let mut standing = self.lock();
        if standing.remove(&(name, subject.to_owned())).is_some() {
            tracing::info!(alarm = name, subject, "alarm ended");
        }
    }

    /// Raises an alarm if there is a text, and ends it otherwise.
    pub fn set(&self, name: &'static str, subject: &str, text: Option<String>, now: Timestamp) {
        match text {
            Some(text) => self.raise(name, subject, text, now),
            None => self.end(name, subject),
        }
    }

    /// The alarms that stand at `now`.
    pub fn all(&self, now: Timestamp) -> Vec<Alarm> {
        let standing = self.standing_at(now);
        standing.values().map(|it| it.alarm.clone()).collect()
    }

    /// Waits for alarms that are new since the last call and returns them. For one caller, which
    /// writes them into the audit log.
    pub async fn raised(&self) -> Vec<Alarm> {
        loop {
            let new = self.take_new();
            if !new.is_empty() {
                return new;
            }
            self.0.raised.notified().await;
        }
    }

    fn take_new(&self) -> Vec<Alarm> {
        let mut standing = self.lock();
        let new = standing
            .values_mut()
            .filter_map(|it| std::mem::take(&mut it.is_new).then(|| it.alarm.clone()));
        new.collect()
    }

    fn standing_at(&self, now: Timestamp) -> MutexGuard<'_, BTreeMap<Key, Standing>> {
        let mut standing = self.lock();
        standing.retain(|_, it| it.until.is_none_or(|until| now < until));
        standing
    }

    /// Each change is one insertion or removal: a panic leaves the map whole.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Standing>> {
        let standing = self.0.standing.lock();
        standing.unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn an_alarm_keeps_its_start_until_it_ends() {
        let alarms = Alarms::default();
        for second in 1..=3 {
            alarms.raise(
                "store",
                "daily.cld",
                format!("damaged {second}"),
                at(second),
            );
        }
        let [alarm] = &alarms.all(at(4))[..] else {
            panic!("one alarm stands");
        };
        assert_eq!((alarm.since, &*alarm.text), (at(1), "damaged 3"));
        alarms.end("store", "daily.cld");
        assert!(alarms.all(at(4)).is_empty());
    }

    #[test]
    fn an_alarm_about_a_past_event_ends_by_itself() {
        let alarms = Alarms::default();
        let span = SignedDuration::from_secs(9);
        alarms.raise_for("store", "x", "healed".to_owned(), span, at(1));
        assert_eq!(alarms.all(at(9)).len(), 1);
        assert!(alarms.all(at(10)).is_empty());
    }

    #[test]
    fn one_kind_of_alarm_is_bounded_and_hides_no_other() {
        let alarms = Alarms::default();
        for number in 0..2 * OF_ONE_NAME_MAX {
            alarms.raise("store", &number.to_string(), String::new(), at(1));
        }
        assert_eq!(alarms.all(at(1)).len(), OF_ONE_NAME_MAX + 1);
        alarms.raise("disk", "", String::new(), at(1));
        assert_eq!(alarms.all(at(1)).len(), OF_ONE_NAME_MAX + 2);
    }

    #[tokio::test]
    async fn each_alarm_is_reported_once() {
        let alarms = Alarms::default();
        for subject in ["a", "b", "a"] {
            alarms.raise("store", subject, String::new(), at(1));
        }
        assert_eq!(alarms.raised().await.len(), 2);
        alarms.raise("store", "c", String::new(), at(2));
        assert_eq!(alarms.raised().await.len(), 1);
    }
}
