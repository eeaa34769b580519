//! Databases that others keep beside a set, and whether they are what clamd stumbles over.
//!
//! One file that cannot be loaded fails the whole load, whichever set it lies beside. The set is not
//! to blame for it then, and to go back to the one before would help nobody.

use std::collections::BTreeSet;

use clamcast_daemon::clamscan::{culprit, is_hosts_trouble};

use super::disk::{Behind, HIDDEN};
use crate::clamd::{LoadTest, Verdict};

/// Whose fault it is that clamd does not have a set.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Blame {
    /// Nobody's; or the set's, because `clamscan` names one of its files.
    Set,
    /// A file's that others have put beside it: which one, and what to do about it.
    Others(String),
    /// This host's: its memory, limits or rights. Why, and what to do about it.
    Host(String),
    /// Only clamd has reported an error, or nobody names a file. Whether clamd loads the previous
    /// set, beside the same files of others, will tell.
    Unknown,
}

impl Blame {
    /// Decides it from what clamd was seen with, or `clamscan` in its place, where these files of
    /// others lie beside the set's.
    pub(super) fn of(verdict: &Verdict, ours: &BTreeSet<&str>, others: &[Other]) -> Self {
        let spins = others.iter().find(|other| !other.is_file());
        match verdict {
            Verdict::Live(_) => Self::Set,
            Verdict::Refused { reason, scan, .. } => match (scan, spins) {
                (LoadTest::Failed(said), _) => Self::of_failure(said, ours, others),
                (_, Some(other)) => Self::Others(other.spins()),
                (LoadTest::Passed, None) => Self::Host(format!(
                    "{reason}, so the set is not at fault; look at clamd's memory and limits, then \
                     restart it"
                )),
                (LoadTest::Hindered(_), None) => Self::Host(format!(
                    "{reason}; look at this host's memory, limits and rights"
                )),
                (LoadTest::Missing(_), None) => Self::Unknown,
            },
            Verdict::Unproven(_) | Verdict::Absent(_) if let Some(other) = spins => {
                Self::Others(other.spins())
            }
            Verdict::Unproven(report) => {
                let note = report.note.as_deref().filter(|note| is_hosts_trouble(note));
                let private = others.iter().find(|other| !other.is_for_everybody());
                match (note, private) {
                    (Some(note), Some(other)) => Self::Others(format!(
                        "{} beside the set is not readable for everybody, and {note}; \
                         `chmod a+r` or remove it",
                        other.place()
                    )),
                    (_, _) => Self::Set,
                }
            }
            Verdict::Absent(_) => Self::Set,
        }
    }

    /// The same from a content error of `clamscan`.
    pub(super) fn of_failure(said: &str, ours: &BTreeSet<&str>, others: &[Other]) -> Self {
        let theirs = others.iter().map(|other| other.name.as_str());
        let culprit = culprit(said, ours.iter().copied().chain(theirs));
        let theirs = culprit.and_then(|name| others.iter().find(|other| other.name == name));
        match (culprit, theirs) {
            (Some(name), _) if ours.contains(name) => Self::Set,
            (_, Some(other)) => Self::Others(format!(
                "{} is not of this set, and clamd loads no set beside it: {said}; mend or remove \
                 it",
                other.place()
            )),
            (_, None) => match others.iter().find(|other| !other.is_file()) {
                Some(other) => Self::Others(other.spins()),
                None => Self::Unknown,
            },
        }
    }
}

/// A database of somebody else's in the directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Other {
    /// Its name, as a message can have it.
    pub(super) name: String,
    /// Its name in `adopted/` if it is still to be restored from there.
    pub(super) kept: Option<String>,
    /// What a reader finds there; `None` where the name is no text, and nobody looked.
    pub(super) behind: Option<Behind>,
}

impl Other {
    /// Where it is now, from the database directory.
    fn place(&self) -> String {
        match &self.kept {
            Some(kept) => format!("{HIDDEN}/adopted/{kept}"),
            None => self.name.clone(),
        }
    }

    /// Why nobody can try it in clamd's place.
    pub(super) fn obstacle(&self) -> Option<String> {
        let name = self.place();
        match &self.behind {
            Some(behind) if !behind.facts.regular => Some(self.spins()),
            Some(behind) if behind.readable => None,
            Some(_) => Some(format!(
                "{name} is not of this set and the agent cannot read it, so it cannot be tried \
                 before clamd gets it; `chmod a+r` or remove it"
            )),
            None => Some(format!(
                "{name} is not of this set and its name is no text, so it cannot be tried before \
                 clamd gets it; rename or remove it"
            )),
        }
    }

    fn is_file(&self) -> bool {
        let behind = self.behind.as_ref();
        behind.is_none_or(|behind| behind.facts.regular)
    }

    fn is_for_everybody(&self) -> bool {
        let behind = self.behind.as_ref();
        behind.is_none_or(|behind| behind.readable && behind.facts.mode & 0o004 != 0)
    }

    fn spins(&self) -> String {
        let name = self.place();
        format!(
            "{name} is not of this set and no file: clamd reads it for ever, or not at all, and \
             loads nothing else; remove it, and restart clamd if it does not come back"
        )
    }
}

#[cfg(test)]
mod tests {
    use clamcast_proto::receipt::{ClamdReport, ClamdState};

    use super::super::disk::{Facts, Inode};
    use super::*;

    /// Others from a line like `site.ndb dir.ndb/ private.ndb!`.
    fn others(line: &str) -> Vec<Other> {
        let other = |word: &str| {
            let name = word.trim_end_matches(['/', '!']);
            let facts = Facts {
                inode: Inode::default(),
                size: 1,
                modified: 0,
                mode: if word.ends_with('!') { 0o640 } else { 0o644 },
                owner: 1,
                changed: 0,
                regular: !word.ends_with('/'),
                directory: word.ends_with('/'),
            };
            Other {
                name: name.to_owned(),
                kept: None,
                behind: Some(Behind {
                    facts,
                    readable: !word.ends_with('!'),
                }),
            }
        };
        line.split_whitespace().map(other).collect()
    }

    fn report(note: &str) -> ClamdReport {
        ClamdReport {
            state: ClamdState::Up,
            note: (!note.is_empty()).then(|| note.to_owned()),
            ..ClamdReport::default()
        }
    }

    fn rejected(scan: LoadTest) -> Verdict {
        Verdict::Refused {
            reason: "clamd: Malformed database".to_owned(),
            scan,
            control: true,
            report: report(""),
        }
    }

    fn refused(said: &str) -> Verdict {
        rejected(LoadTest::Failed(said.to_owned()))
    }

    /// `set`, `unknown`, or the first word of what is said of others: a name.
    #[track_caller]
    fn check(verdict: &Verdict, lies_beside: &str, expected: &str) {
        let ours = BTreeSet::from(["daily.cud", "x.ndb"]);
        let blame = Blame::of(verdict, &ours, &others(lies_beside));
        let said = match &blame {
            Blame::Set => "set",
            Blame::Others(said) => said.split(' ').next().unwrap(),
            Blame::Host(_) => "host",
            Blame::Unknown => "unknown",
        };
        assert_eq!(said, expected, "{verdict:?} {blame:?}");
    }

    #[test]
    fn the_owner_of_the_named_file_is_to_blame() {
        let ours = "clamd: Malformed database; clamscan: Can't load x.ndb: Malformed database";
        let theirs = "clamscan: Problem parsing database at line 1; \
                      Can't load site.ndb: Malformed database";
        check(&refused(ours), "site.ndb", "set");
        check(&refused(theirs), "site.ndb", "site.ndb");
        check(&refused(theirs), "", "unknown");
        check(&refused("Malformed database"), "", "unknown");
    }

    #[test]
    fn what_clamscan_loads_or_is_hindered_at_is_the_hosts_fault_whatever_clamd_says() {
        check(&rejected(LoadTest::Passed), "site.ndb", "host");
        let hindered = || LoadTest::Hindered("Can't allocate memory".to_owned());
        check(&rejected(hindered()), "", "host");
        check(&rejected(hindered()), "dir.ndb/", "dir.ndb");
        let missing = LoadTest::Missing("no clamscan on this host".to_owned());
        check(&rejected(missing), "", "unknown");
    }

    #[test]
    fn of_a_container_and_its_member_the_container_is_to_blame() {
        let reason = "Can't load site.ndb: Malformed database; cli_tgzload: Can't load site.ndb; \
                      Can't load daily.cud: Malformed database";
        check(&refused(reason), "site.ndb", "set");
        let reason =
            "Can't load x.ndb: Malformed database; Can't load site.cud: Malformed database";
        check(&refused(reason), "site.cud", "site.cud");
    }

    #[test]
    fn a_name_with_spaces_colons_or_libclamavs_own_words_is_found_whole() {
        #[track_caller]
        fn check(reason: &str, files: &[&str], expected: Option<&str>) {
            assert_eq!(culprit(reason, files.iter().copied()), expected, "{reason}");
        }
        let files = [
            "a",
            "a.ndb",
            "a.ndb: b.ndb",
            "b.ndb",
            "my file.ndb",
            "gr\u{f6}\u{df}e.ndb",
        ];
        for name in &files[1..] {
            let reason = format!("line 1; Can't load {name}: Malformed database");
            check(&reason, &files, Some(name));
            check(&format!("Can't load {name}"), &files, Some(name));
            check(&format!("{reason}; Can't load gone.ndb"), &files, None);
        }
        let odd = ["x Can't load b.ndb", "b.ndb"];
        check(
            "Can't load x Can't load b.ndb: Malformed database",
            &odd,
            Some(odd[0]),
        );
        check(
            "Can't load x.ndb: y; Can't load b.ndb: Malformed database",
            &odd,
            Some("b.ndb"),
        );
        check("Malformed database", &odd, None);
    }

    #[test]
    fn where_nobody_is_named_the_set_before_will_tell() {
        check(&refused("clamd: Malformed database"), "site.ndb", "unknown");
        let third = "Can't load gone.ndb: Malformed database";
        check(&refused(third), "site.ndb", "unknown");
    }

    #[test]
    fn what_is_no_file_is_to_blame_for_silence_too() {
        check(&Verdict::Unproven(report("")), "a.ndb dir.ndb/", "dir.ndb");
        check(&Verdict::Absent(report("")), "dir.ndb/", "dir.ndb");
        check(
            &refused("clamd: Broken or not a CVD file"),
            "d.cud/",
            "d.cud",
        );
        check(&Verdict::Live(report("")), "dir.ndb/", "set");
    }

    #[test]
    fn a_file_that_clamd_may_not_read_is_to_blame_if_it_says_so() {
        let denied = Verdict::Unproven(report("it could not load: Can't open file or directory"));
        check(&denied, "site.ndb private.ndb!", "private.ndb");
        check(&denied, "site.ndb", "set");
        check(
            &Verdict::Unproven(report("it is slow")),
            "private.ndb!",
            "set",
        );
    }
}
