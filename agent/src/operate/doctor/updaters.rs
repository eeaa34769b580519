//! Who else brings databases to this host.

use std::path::{Path, PathBuf};

use super::{Finding, Inventory};
use crate::host::updater::{self, FRESHCLAM_DIRECTORY, PROGRAMS};
use crate::host::{Host, Process};

/// Files that cron reads itself.
const CRONTABS: [&str; 2] = ["/etc/crontab", "/etc/anacrontab"];

/// Directories of crontabs and of scripts that cron starts. Users' own crontabs are in the last two:
/// Red Hat's, Debian's.
const CRON_DIRECTORIES: [&str; 7] = [
    "/etc/cron.d",
    "/etc/cron.hourly",
    "/etc/cron.daily",
    "/etc/cron.weekly",
    "/etc/cron.monthly",
    "/var/spool/cron",
    "/var/spool/cron/crontabs",
];

/// Signs of another updater.
#[derive(Clone, Debug, Default)]
pub struct Signs {
    /// What is enabled at boot: units and timers.
    pub units: Vec<String>,
    /// Files of cron that name one: path and the updater's name.
    pub cron: Vec<(PathBuf, &'static str)>,
    /// Crontabs that cannot be read.
    pub unread: Vec<PathBuf>,
    /// The directory in the freshclam.conf of the distribution.
    pub freshclam_writes: Option<PathBuf>,
}

/// Looks for signs. What users have in their own crontabs only root can read.
pub(super) fn look(host: &Host) -> Signs {
    let mut signs = Signs::default();
    let wants = host.names("/etc/systemd/system").into_iter();
    for wants in wants.filter(|name| name.ends_with(".wants")) {
        for unit in host.names(format!("/etc/systemd/system/{wants}")) {
            let known = PROGRAMS.iter().any(|program| program.is_started_by(&unit));
            // systemd starts no masked unit, also where a link asks for it.
            let mask = std::fs::read_link(host.at(format!("/etc/systemd/system/{unit}")));
            let is_masked = mask.is_ok_and(|target| target == Path::new("/dev/null"));
            if known && !is_masked && !signs.units.contains(&unit) {
                signs.units.push(unit);
            }
        }
    }

    let mut tabs = CRONTABS.map(PathBuf::from).to_vec();
    for directory in CRON_DIRECTORIES.map(Path::new) {
        if let Err(error) = std::fs::read_dir(host.at(directory))
            && error.kind() == std::io::ErrorKind::PermissionDenied
        {
            signs.unread.push(directory.to_owned());
        }
        let names = host.names(directory).into_iter();
        tabs.extend(names.map(|name| directory.join(name)));
    }
    for tab in tabs.into_iter().filter(|tab| host.at(tab).is_file()) {
        match host.text(&tab) {
            Ok(text) => {
                let mut programs = PROGRAMS.iter();
                let named = programs.find(|program| program.is_started_in(&text));
                signs.cron.extend(named.map(|program| (tab, program.name)));
            }
            Err(_) => signs.unread.push(tab),
        }
    }

    signs.freshclam_writes = updater::configured_directory(host);
    signs
}

/// Where the command line of the freshclam that runs leads. For a process without root's rights.
pub(super) fn told(host: &Host, processes: &[Process]) -> Option<PathBuf> {
    let mut processes = processes.iter();
    processes.find_map(|process| updater::told_directory(host, process))
}

/// Judges them. `ours` is the database directory after links, as `real` follows them; `told` is
/// where the command line of freshclam leads.
pub(super) fn judge(
    inventory: &Inventory,
    ours: &Path,
    told: Option<&Path>,
    real: impl Fn(&Path) -> PathBuf,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for program in &PROGRAMS {
        let running = inventory.processes.iter();
        let running: Vec<_> = running.filter(|p| program.runs_as(p, ours)).collect();
        let units = inventory.updaters.units.iter();
        let units = units.filter(|unit| program.is_started_by(unit));
        let units: Vec<_> = units.cloned().collect();
        let cron = inventory.updaters.cron.iter();
        let cron: Vec<_> = cron.filter(|(_, name)| *name == program.name).collect();
        let mut found: Vec<String> = running.iter().map(|p| format!("{p} runs")).collect();
        found.extend(units.iter().map(|unit| format!("{unit} is enabled")));
        let in_cron = |(path, name): &&(PathBuf, &str)| format!("{} runs {name}", path.display());
        found.extend(cron.iter().map(in_cron));
        if found.is_empty() {
            continue;
        }
        let found = found.join(", ");
        let end = end_it(&units, &cron, &running);
        findings.push(if program.is_freshclam() {
            // Its command line counts before its configuration.
            let writes = told.or(inventory.updaters.freshclam_writes.as_deref());
            let writes = writes.unwrap_or(Path::new(FRESHCLAM_DIRECTORY));
            if real(writes) == ours {
                let found = format!("{found}; it writes {}, as the agent does", writes.display());
                Finding::bad("updaters", found, end)
            } else {
                let found = format!("{found}; it writes {}", writes.display());
                let advice =
                    format!("nothing, as long as clamd does not load that directory; else {end}");
                Finding::note("updaters", found, advice)
            }
        } else {
            let advice = format!(
                "nothing, if what it brings is not in the mirror and it may write {}; else {end}",
                ours.display()
            );
            Finding::note("updaters", found, advice)
        });
    }
    if findings.is_empty() && !inventory.sees_all_processes {
        let why = "no unit or cron job is there, but not all processes can be seen";
        findings.push(Finding::unknown(
            "updaters",
            why,
            Some("run this as root".into()),
        ));
    } else if findings.is_empty() && !inventory.updaters.unread.is_empty() {
        let unread = inventory.updaters.unread.iter();
        let unread: Vec<_> = unread.map(|path| path.display().to_string()).collect();
        let why = format!("none runs or is enabled; cannot read {}", unread.join(", "));
        findings.push(Finding::unknown(
            "updaters",
            why,
            Some("run this as root".into()),
        ));
    } else if findings.is_empty() {
        findings.push(Finding::good("updaters", "nobody else brings databases"));
    }
    findings
}

fn end_it(units: &[String], cron: &[&(PathBuf, &str)], running: &[&Process]) -> String {
    let mut steps = Vec::new();
    if !units.is_empty() {
        steps.push(format!("systemctl disable --now {}", units.join(" ")));
    }
    if let Some((path, _)) = cron.first() {
        steps.push(format!("take it out of {}", path.display()));
    }
    match running.first() {
        // Not enabled and yet there: started by hand, or by another's supervisor.
        Some(process) if steps.is_empty() && process.name == "freshclam" => {
            steps.push("systemctl disable --now clamav-freshclam".into());
        }
        Some(process) if steps.is_empty() => steps.push(format!("stop process {}", process.pid)),
        Some(_) | None => {}
    }
    steps.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::doctor::testing;

    fn process(name: &str, arguments: &[&str]) -> Process {
        Process {
            pid: 612,
            name: name.into(),
            uid: 0,
            arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
        }
    }

    #[track_caller]
    fn check(signs: Signs, processes: Vec<Process>, expected: &str) {
        let inventory = Inventory {
            processes,
            updaters: signs,
            sees_all_processes: true,
            key: None,
        };
        let told = told(&Host::below("/nowhere"), &inventory.processes);
        let ours = Path::new("/var/lib/clamav");
        let findings = judge(&inventory, ours, told.as_deref(), Path::to_owned);
        assert_eq!(testing::lines(&findings), expected);
    }

    #[test]
    fn freshclam_on_our_directory_is_bad_and_elsewhere_a_note() {
        check(
            Signs::default(),
            vec![],
            "good updaters: nobody else brings databases",
        );
        let enabled = Signs {
            units: vec!["clamav-freshclam.service".into()],
            ..Signs::default()
        };
        check(
            enabled.clone(),
            vec![process("freshclam", &["freshclam", "-d"])],
            "bad updaters: freshclam (pid 612, user root) runs, clamav-freshclam.service is \
             enabled; it writes /var/lib/clamav, as the agent does -> systemctl disable --now \
             clamav-freshclam.service",
        );
        let elsewhere = Signs {
            freshclam_writes: Some("/srv/mirror".into()),
            ..enabled
        };
        check(
            elsewhere.clone(),
            vec![],
            "note updaters: clamav-freshclam.service is enabled; it writes /srv/mirror -> nothing, \
             as long as clamd does not load that directory; else systemctl disable --now \
             clamav-freshclam.service",
        );
        check(
            elsewhere,
            vec![process(
                "freshclam",
                &["freshclam", "--datadir=/var/lib/clamav"],
            )],
            "bad updaters: freshclam (pid 612, user root) runs, clamav-freshclam.service is \
             enabled; it writes /var/lib/clamav, as the agent does -> systemctl disable --now \
             clamav-freshclam.service",
        );
    }

    #[test]
    fn others_are_notes_and_known_by_what_a_process_shows_of_its_name() {
        check(
            Signs::default(),
            vec![process("clamav-unoffici", &[])],
            "note updaters: clamav-unoffici (pid 612, user root) runs -> nothing, if what it \
             brings is not in the mirror and it may write /var/lib/clamav; else stop process 612",
        );
    }

    #[test]
    fn what_debian_and_red_hat_enable_is_found_on_their_disks() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        let write = |path: &str, text: &str| host.write(path, text);
        assert!(look(&host).units.is_empty());
        write(
            "/etc/systemd/system/multi-user.target.wants/clamav-freshclam.service",
            "",
        );
        write(
            "/etc/systemd/system/timers.target.wants/fangfrisch.timer",
            "",
        );
        write(
            "/etc/systemd/system/timers.target.wants/logrotate.timer",
            "",
        );
        write(
            "/etc/cron.d/clamav-update",
            "# freshclam\n0 3 * * * root /usr/bin/freshclam -q\n",
        );
        write(
            "/etc/cron.daily/harmless",
            "# freshclam was here\necho fresh\n",
        );
        write(
            "/etc/freshclam.conf",
            "#DatabaseDirectory /x\nDatabaseDirectory /srv/clam\n",
        );
        let signs = look(&host);
        assert_eq!(
            signs.units,
            ["clamav-freshclam.service", "fangfrisch.timer"]
        );
        write("/etc/cron.monthly/sigs", "exec fangfrisch refresh\n");
        write("/var/spool/cron/root", "@daily freshclam\n");
        write("/var/spool/cron/crontabs/clamav", "@daily cvdupdate\n");
        let found = look(&host).cron;
        let found = found
            .iter()
            .map(|(path, name)| (path.to_str().unwrap(), *name));
        assert_eq!(
            found.collect::<Vec<_>>(),
            [
                ("/etc/cron.d/clamav-update", "freshclam"),
                ("/etc/cron.monthly/sigs", "fangfrisch"),
                ("/var/spool/cron/root", "freshclam"),
                ("/var/spool/cron/crontabs/clamav", "cvdupdate"),
            ]
        );
        assert_eq!(signs.freshclam_writes, Some("/srv/clam".into()));
    }
}
