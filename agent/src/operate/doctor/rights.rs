//! Who may do what: the agent owns the databases, clamd reads them, and no more.

use std::io;
use std::path::Path;

use super::Finding;
use crate::host::{Node, User};
use crate::install::HIDDEN;

/// Paths whose rights are judged, as they were found.
#[derive(Debug)]
pub(super) struct Paths {
    /// The directories that lead to the database directory, and itself.
    pub(super) database: io::Result<Vec<Node>>,
    /// Whether the agent's user can make files there.
    pub(super) writable: Result<(), String>,
    /// The databases.
    pub(super) files: Vec<Node>,
    /// `.clamcast`, if it is there.
    pub(super) hidden: Option<Node>,
    /// The state directory.
    pub(super) state: io::Result<Node>,
    /// The directories that lead to the host's key, and itself.
    pub(super) key: io::Result<Vec<Node>>,
}

impl Paths {
    /// Looks at them as the user `this`.
    pub(super) fn look(
        database: &Path,
        state: &Path,
        key: &Path,
        this: &User,
        agent: &User,
    ) -> Self {
        use nix::unistd::{AccessFlags, eaccess};
        let files = crate::host::memory::names(database);
        let files = files
            .iter()
            .filter_map(|name| Node::at(&database.join(name)).ok());
        let wanted = AccessFlags::W_OK | AccessFlags::X_OK;
        let writable = match this.uid == agent.uid {
            true => eaccess(database, wanted).map_err(|errno| errno.desc().to_owned()),
            false => Ok(()), // for others by the bits only
        };
        Self {
            database: Node::way(database),
            writable,
            files: files.collect(),
            hidden: Node::at(&database.join(HIDDEN)).ok(),
            state: Node::at(state),
            key: Node::way(key),
        }
    }
}

/// Judges what the agent's own user needs and what others must not have. With `key_is_passed` systemd
/// reads the key as root.
pub(super) fn judge_agent(
    paths: &Paths,
    names: [&Path; 3],
    agent: &User,
    key_is_passed: bool,
) -> Vec<Finding> {
    let [database, state, key] = names.map(Path::display);
    let user = &agent.name;
    let own = format!("chown {user}: {database} && chmod 755 {database}");
    let mut findings = Vec::new();

    let directory = paths.database.as_ref().map(|way| way.last());
    findings.push(match directory {
        Err(error) => Finding::bad(
            "database",
            format!("{database}: {error}"),
            format!("install -d -o {user} -g {user} -m 755 {database}"),
        )
        .denied(super::is_denied(error)),
        Ok(None) => Finding::unknown("database", "it has no path", None),
        Ok(Some(node)) => {
            let found = format!("{database} is {}", node.rights());
            match &paths.writable {
                _ if node.uid != agent.uid => {
                    let found = format!("{found}; it has to belong to {user}");
                    Finding::bad("database", found, own)
                }
                _ if node.mode & 0o022 != 0 => {
                    let found = format!("{found}: others than {user} may put databases there");
                    Finding::bad("database", found, format!("chmod 755 {database}"))
                }
                Err(error) => {
                    let found = format!("{found}, and yet {user} cannot write there: {error}");
                    Finding::bad("database", found, own)
                }
                Ok(()) => Finding::good("database", found),
            }
        }
    });
    if let Some(hidden) = &paths.hidden
        && (hidden.uid != agent.uid || hidden.mode & 0o077 != 0)
    {
        let path = hidden.path.display();
        findings.push(Finding::bad(
            "database",
            format!("{path} is {}; it has to be {user}'s alone", hidden.rights()),
            format!("chown -R {user}: {path} && chmod 700 {path}"),
        ));
    }

    findings.push(match &paths.state {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::note(
            "state",
            format!("{state}: {error}"),
            "nothing before the first start, which makes it",
        ),
        Err(error) => Finding::bad(
            "state",
            format!("{state}: {error}"),
            format!("let {user} pass the directories that lead there"),
        )
        .denied(super::is_denied(error)),
        Ok(node) if node.uid != agent.uid || node.mode & 0o077 != 0 => Finding::bad(
            "state",
            format!("{state} is {}; it has to be {user}'s alone", node.rights()),
            format!("chown -R {user}: {state} && chmod 700 {state}"),
        ),
        Ok(node) => Finding::good("state", format!("{state} is {}", node.rights())),
    });

    findings.push(match paths.key.as_ref().map(|way| way.last()) {
        Err(error) => Finding::bad(
            "key",
            format!("{key}: {error}"),
            format!(
                "put the bundle of `clamcast-certs agent` there, as {user}'s: chown {user}: {key}"
            ),
        )
        .denied(super::is_denied(error)),
        Ok(None) => Finding::unknown("key", "it has no path", None),
        Ok(Some(node)) if key_is_passed && node.uid == 0 && node.mode & 0o077 == 0 => {
            let found = format!("{key} is {}; systemd passes it on", node.rights());
            Finding::good("key", found)
        }
        Ok(Some(node)) if node.uid != agent.uid || node.mode & 0o077 != 0 => Finding::bad(
            "key",
            format!("{key} is {}; it has to be {user}'s alone", node.rights()),
            format!("chown {user}: {key} && chmod 600 {key}"),
        ),
        Ok(Some(node)) => Finding::good("key", format!("{key} is {}", node.rights())),
    });
    findings
}

/// Judges what clamd's user can do: read the databases, and nothing of the agent's besides. From
/// permission bits, since nobody can try it as another user.
pub(super) fn judge_clamd(paths: &Paths, clamd: Option<&User>, agent: &User) -> Vec<Finding> {
    let Some(clamd) = clamd else {
        let why = "no clamd.conf names clamd's user, and no clamd runs";
        return vec![Finding::unknown("clamd-user", why, None)];
    };
    let name = &clamd.name;
    if clamd.uid == agent.uid {
        let found = format!("clamd runs as {name}, and so does the agent");
        let advice = "give them different users: a scanner that parses hostile files must not be \
                      able to rewrite its signatures or to use the agent's key";
        return vec![Finding::bad("clamd-user", found, advice)];
    }
    if clamd.uid == 0 {
        let found = "clamd runs as root: who takes it over owns its signatures and this host";
        let advice = "set `User` in clamd.conf to a user of its own";
        return vec![Finding::note("clamd-user", found, advice)];
    }
    let mut findings = Vec::new();
    let databases = paths.database.as_deref().unwrap_or_default();
    let (last, _) = databases
        .split_last()
        .map_or((None, &[][..]), |(l, w)| (Some(l), w));

    let closed = databases.iter().find(|node| !clamd.may(node, 1));
    let unlisted = last.filter(|node| !clamd.may(node, 4));
    let unread = paths.files.iter().find(|node| !clamd.may(node, 4));
    let in_the_way = [(closed, "o+x"), (unlisted, "o+rx"), (unread, "644")];
    let in_the_way = in_the_way
        .into_iter()
        .find_map(|(node, mode)| Some((node?, mode)));
    if let Some((node, mode)) = in_the_way {
        let path = node.path.display();
        findings.push(Finding::bad(
            "clamd-reads",
            format!(
                "clamd's user {name} cannot read {path} ({}); it would scan without what it \
                 cannot read",
                node.rights()
            ),
            format!("chmod {mode} {path}"),
        ));
    } else if last.is_some() {
        findings.push(Finding::good(
            "clamd-reads",
            format!("{name} can read the databases"),
        ));
    }

    let key = paths.key.as_deref().unwrap_or_default();
    let reaches_key = !key.is_empty()
        && key.split_last().is_some_and(|(key, way)| {
            clamd.may(key, 4) && way.iter().all(|node| clamd.may(node, 1))
        });
    let user = &agent.name;
    // An owner can give itself the right.
    let writes = |node: &&Node| clamd.uid == node.uid || clamd.may(node, 2);
    let planted = last.filter(writes).or(paths.hidden.as_ref().filter(writes));
    let written = planted.or_else(|| paths.files.iter().find(writes));
    // Whoever can write a directory on the way can put another one under its name, unless it is
    // sticky and another's.
    let above = |nodes: &[Node]| nodes.len().saturating_sub(1);
    let mut ways = databases[..above(databases)]
        .iter()
        .chain(&key[..above(key)]);
    let moved = ways.find(|node| {
        let sticky = node.mode & 0o1000 != 0 && node.uid != clamd.uid;
        writes(node) && !sticky
    });
    if let Some(node) = moved {
        let (path, rights) = (node.path.display(), node.rights());
        findings.push(Finding::bad(
            "clamd-writes",
            format!(
                "clamd's user {name} can write {path} ({rights}): it could put a directory of its \
                 own in the place of one in there that the agent uses"
            ),
            format!("chown root: {path} && chmod go-w {path}"),
        ));
    }
    if let Some(node) = written {
        let (path, rights) = (node.path.display(), node.rights());
        findings.push(Finding::bad(
            "clamd-writes",
            format!(
                "clamd's user {name} can write {path} ({rights}): it could rewrite its signatures"
            ),
            format!("chown {user}: {path} && chmod go-w {path}"),
        ));
    }
    if reaches_key {
        let path = key.last().expect("it is not empty").path.display();
        findings.push(Finding::bad(
            "clamd-writes",
            format!("clamd's user {name} can read {path}: it could speak for the agent"),
            format!("chmod 600 {path}"),
        ));
    }
    let unseen = paths.database.as_ref().err().or(paths.key.as_ref().err());
    if moved.is_some() || written.is_some() || reaches_key {
        // It is said.
    } else if let Some(why) = unseen {
        let why = format!("not everything can be looked at: {why}");
        findings.push(Finding::unknown("clamd-writes", why, None));
    } else {
        let found = format!("{name} can neither write databases nor read the agent's key");
        findings.push(Finding::good("clamd-writes", found));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::doctor::testing;

    fn node(path: &str, uid: u32, mode: u32) -> Node {
        Node {
            path: path.into(),
            uid,
            gid: 4_000_000,
            mode,
        }
    }

    fn user(name: &str, uid: u32) -> User {
        User {
            name: name.into(),
            uid,
            gids: vec![],
        }
    }

    const AGENT: u32 = 4_000_001;
    const CLAMD: u32 = 4_000_002;

    fn as_it_should_be() -> Paths {
        let way = |last: Node| vec![node("/", 0, 0o755), node("/var", 0, 0o755), last];
        Paths {
            database: Ok(way(node("/var/db", AGENT, 0o755))),
            writable: Ok(()),
            files: vec![node("/var/db/daily.cld", AGENT, 0o644)],
            hidden: Some(node("/var/db/.clamcast", AGENT, 0o700)),
            state: Ok(node("/state", AGENT, 0o700)),
            key: Ok(vec![node("/", 0, 0o755), node("/key", AGENT, 0o600)]),
        }
    }

    /// What is not good of both checks after `change`, a line each.
    #[track_caller]
    fn check(change: impl Fn(&mut Paths), expected: &[&str]) {
        let mut paths = as_it_should_be();
        change(&mut paths);
        let names = ["/var/db", "/state", "/key"].map(Path::new);
        let agent = user("clamcast", AGENT);
        let mut findings = judge_agent(&paths, names, &agent, false);
        findings.extend(judge_clamd(&paths, Some(&user("clamav", CLAMD)), &agent));
        findings.retain(|finding| finding.state != crate::operate::doctor::State::Good);
        let lines = testing::lines(&findings);
        assert_eq!(lines.lines().count(), expected.len(), "{lines}");
        for (line, words) in lines.lines().zip(expected) {
            for word in words.split(" | ") {
                assert!(line.contains(word), "{line} lacks {word}");
            }
        }
    }

    #[test]
    fn the_agent_owns_the_databases_and_clamd_reads_them() {
        check(|_| {}, &[]);
        let database = |change: fn(&mut Node)| {
            move |paths: &mut Paths| change(paths.database.as_mut().unwrap().last_mut().unwrap())
        };
        check(
            database(|node| node.uid = CLAMD),
            &[
                "bad database: | has to belong to clamcast | chown clamcast: /var/db && chmod 755",
                "bad clamd-writes: | can write /var/db",
            ],
        );
        check(
            database(|node| node.mode = 0o777),
            &[
                "bad database: | others | chmod 755 /var/db",
                "bad clamd-writes",
            ],
        );
        check(
            database(|node| node.mode = 0o700),
            &["bad clamd-reads: | cannot read /var/db | chmod o+x /var/db"],
        );
        check(
            |paths| paths.database.as_mut().unwrap()[1].mode = 0o750,
            &["bad clamd-reads: | cannot read /var ( | chmod o+x /var"],
        );
        check(
            |paths| paths.files[0].mode = 0o600,
            &["bad clamd-reads: | /var/db/daily.cld | without what it cannot read | chmod 644"],
        );
        check(
            |paths| paths.writable = Err("Permission denied".into()),
            &["bad database: | cannot write there: Permission denied"],
        );
        check(
            |paths| {
                paths.database = Err(io::ErrorKind::NotFound.into());
                paths.files.clear();
                paths.hidden = None;
            },
            &[
                "bad database: | install -d -o clamcast -g clamcast -m 755 /var/db",
                "unknown clamd-writes: | not found",
            ],
        );
    }

    #[test]
    fn clamds_user_can_put_nothing_in_the_place_of_what_the_agent_uses() {
        let parent = |uid: u32, mode: u32| {
            move |paths: &mut Paths| {
                let node = &mut paths.database.as_mut().unwrap()[1];
                (node.uid, node.mode) = (uid, mode);
            }
        };
        let found = "bad clamd-writes: | can write /var ( | chown root: /var && chmod go-w /var";
        check(parent(CLAMD, 0o755), &[found]);
        check(parent(CLAMD, 0o555), &[found]);
        check(parent(CLAMD, 0o1777), &[found]);
        check(parent(0, 0o777), &[found]);
        check(parent(0, 0o1777), &[]);
        check(
            |paths| paths.key.as_mut().unwrap()[0].mode = 0o777,
            &["bad clamd-writes: | can write / ("],
        );
        check(
            |paths| paths.key = Err(io::ErrorKind::PermissionDenied.into()),
            &[
                "bad key: | permission denied",
                "unknown clamd-writes: | permission denied",
            ],
        );
    }

    #[test]
    fn what_is_the_agents_alone_is_nobody_elses() {
        check(
            |paths| paths.hidden.as_mut().unwrap().mode = 0o755,
            &["bad database: /var/db/.clamcast | alone | chmod 700"],
        );
        check(
            |paths| paths.state.as_mut().unwrap().mode = 0o755,
            &["bad state: | chown -R clamcast: /state && chmod 700 /state"],
        );
        check(
            |paths| paths.state = Err(io::ErrorKind::NotFound.into()),
            &["note state: | first start"],
        );
        check(
            |paths| paths.state = Err(io::ErrorKind::PermissionDenied.into()),
            &["bad state: | permission denied | let clamcast pass"],
        );
        check(
            |paths| paths.key.as_mut().unwrap()[1].mode = 0o644,
            &[
                "bad key: | chmod 600 /key",
                "bad clamd-writes: | can read /key",
            ],
        );
        check(
            |paths| paths.key.as_mut().unwrap()[1].uid = 0,
            &["bad key: | chown clamcast: /key"],
        );
    }

    #[test]
    fn a_key_that_systemd_passes_on_may_belong_to_root_and_to_nobody_else() {
        let names = ["/var/db", "/state", "/key"].map(Path::new);
        for (uid, mode, expected) in [
            (0, 0o600, "good key: /key"),
            (AGENT, 0o600, "good key: /key"),
            (0, 0o640, "bad key: /key"),
            (CLAMD, 0o600, "bad key: /key"),
        ] {
            let mut paths = as_it_should_be();
            let key = &mut paths.key.as_mut().unwrap()[1];
            (key.uid, key.mode) = (uid, mode);
            let findings = judge_agent(&paths, names, &user("clamcast-agent", AGENT), true);
            let lines = testing::lines(&findings);
            assert!(
                lines.lines().any(|line| line.starts_with(expected)),
                "{lines}"
            );
        }
    }

    #[test]
    fn clamd_and_the_agent_have_users_of_their_own() {
        let agent = user("clamcast", AGENT);
        for (clamd, expected) in [
            (
                Some(user("clamcast", AGENT)),
                "bad clamd-user: clamd runs as clamcast, and so",
            ),
            (Some(user("root", 0)), "note clamd-user: clamd runs as root"),
            (None, "unknown clamd-user: no clamd.conf names"),
        ] {
            let lines = testing::lines(&judge_clamd(&as_it_should_be(), clamd.as_ref(), &agent));
            assert!(lines.starts_with(expected), "{lines}");
        }
    }
}
