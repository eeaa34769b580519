//! AppArmor and SELinux: whether they let clamd read the database directory. Both come with rules
//! for the distribution's own directory only.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::Finding;
use crate::host::Host;

/// The directory that distributions have rules for.
const USUAL: &str = "/var/lib/clamav";

/// Debian's profile, and the local rules that it includes.
const PROFILE: &str = "/etc/apparmor.d/usr.sbin.clamd";
const LOCAL: &str = "/etc/apparmor.d/local/usr.sbin.clamd";
const DISABLED: &str = "/etc/apparmor.d/disable/usr.sbin.clamd";

/// SELinux's types for what clamd reads as databases.
const DATABASE_TYPES: [&str; 3] = ["antivirus_db_t", "clamd_var_lib_t", "clamscan_var_lib_t"];

/// The boolean that lets antivirus programs read every file.
const SCAN_SYSTEM: &str = "antivirus_can_scan_system";

/// What confines clamd.
#[derive(Clone, Debug, Default)]
pub(super) struct Confinement {
    /// The enforced AppArmor profile of clamd with its local rules, as text.
    pub(super) apparmor: Option<String>,
    /// SELinux, where it enforces.
    pub(super) selinux: Option<Selinux>,
}

/// What SELinux has to say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Selinux {
    /// Whether antivirus programs may read every file.
    pub(super) scan_system: bool,
    /// The label of the database directory, if it could be seen.
    pub(super) label: Option<String>,
}

impl Confinement {
    /// Looks at `host`; `directory` is the database directory after links.
    pub(super) fn look(host: &Host, directory: &Path) -> Self {
        let is = |path: &str, value: &str| host.text(path).is_ok_and(|text| text.trim() == value);
        let apparmor = (is("/sys/module/apparmor/parameters/enabled", "Y") && !host.has(DISABLED))
            .then(|| host.text(PROFILE).ok())
            .flatten()
            .filter(|profile| !is_complaining(profile))
            .map(|profile| profile + &host.text(LOCAL).unwrap_or_default());
        let selinux = is("/sys/fs/selinux/enforce", "1").then(|| Selinux {
            scan_system: host
                .text(format!("/sys/fs/selinux/booleans/{SCAN_SYSTEM}"))
                .is_ok_and(|text| text.starts_with('1')),
            label: label(directory),
        });
        Self { apparmor, selinux }
    }
}

/// `flags=(complain)`: it only logs.
fn is_complaining(profile: &str) -> bool {
    let lines = profile
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'));
    let mut flags = lines.filter_map(|line| line.split_once("flags=(")?.1.split_once(')'));
    flags.any(|(flags, _)| flags.split([',', ' ']).any(|flag| flag == "complain"))
}

/// As coreutils shows it, which links the library for it.
fn label(directory: &Path) -> Option<String> {
    let output = Command::new("stat")
        .arg("--format=%C")
        .arg(directory)
        .output()
        .ok()?;
    let label = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && label.contains(':')).then_some(label)
}

/// Judges them for `directory`, the database directory after links.
pub(super) fn judge(confinement: &Confinement, directory: &Path) -> Vec<Finding> {
    let shown = directory.display();
    let mut findings = Vec::new();
    findings.push(match &confinement.apparmor {
        None => Finding::good("apparmor", "no enforced profile for clamd"),
        Some(rules) if is_covered(rules, directory) => Finding::good(
            "apparmor",
            format!("clamd's profile has a rule for {shown}"),
        ),
        Some(_) => Finding::bad(
            "apparmor",
            format!("clamd's profile ({PROFILE}) has no rule for {shown}: clamd cannot read it"),
            format!(
                "printf '{shown}/ r,\\n{shown}/** r,\\n' >> {LOCAL} && apparmor_parser -r {PROFILE}"
            ),
        ),
    });
    findings.push(match &confinement.selinux {
        None => Finding::good("selinux", "not enforcing"),
        Some(Selinux {
            scan_system: true, ..
        }) => Finding::good("selinux", format!("{SCAN_SYSTEM} is on")),
        Some(Selinux {
            label: Some(label), ..
        }) if DATABASE_TYPES
            .iter()
            .any(|kind| label.split(':').any(|part| part == *kind)) =>
        {
            Finding::good("selinux", format!("{shown} is labelled {label}"))
        }
        Some(Selinux { label: None, .. }) if directory == Path::new(USUAL) => {
            let why = format!("enforcing, and the label of {shown} cannot be seen");
            Finding::unknown("selinux", why, Some(format!("ls -Zd {shown}")))
        }
        Some(Selinux { label, .. }) => Finding::bad(
            "selinux",
            format!(
                "enforcing, {shown} is labelled {}, and {SCAN_SYSTEM} is off: clamd cannot read it",
                label.as_deref().unwrap_or("something that cannot be seen")
            ),
            relabel(directory),
        ),
    });
    findings
}

/// Whether a rule covers everything below the directory: its path ends in `/**`.
fn is_covered(rules: &str, directory: &Path) -> bool {
    let lines = rules
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#'));
    let mut words = lines.flat_map(str::split_whitespace);
    words.any(|word| {
        let above = word
            .trim_matches('"')
            .strip_suffix("/**")
            .map(PathBuf::from);
        above.is_some_and(|above| above.is_absolute() && directory.starts_with(above))
    })
}

fn relabel(directory: &Path) -> String {
    let directory = directory.display();
    if directory.to_string() == USUAL {
        return format!("restorecon -R {directory}");
    }
    format!(
        "semanage fcontext -a -t antivirus_db_t '{directory}(/.*)?' && restorecon -R {directory}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::doctor::testing;

    const DEBIAN: &str = "/usr/sbin/clamd {\n  capability setuid,\n  /var/lib/clamav/ r,\n  \
                          /var/lib/clamav/** krw,\n  /** r,\n}\n";

    #[track_caller]
    fn check(apparmor: Option<&str>, selinux: Option<(bool, Option<&str>)>, expected: [&str; 2]) {
        let confinement = Confinement {
            apparmor: apparmor.map(str::to_owned),
            selinux: selinux.map(|(scan_system, label)| Selinux {
                scan_system,
                label: label.map(str::to_owned),
            }),
        };
        testing::assert_lines(&judge(&confinement, Path::new("/srv/clamav")), &expected);
    }

    #[test]
    fn a_directory_of_ones_own_needs_a_rule_of_its_own() {
        check(None, None, ["good apparmor", "good selinux"]);
        let debian = DEBIAN.replace("/** r,\n}", "}");
        check(
            Some(&debian),
            Some((false, Some("system_u:object_r:var_t:s0"))),
            [
                "bad apparmor: | apparmor_parser -r /etc/apparmor.d/usr.sbin.clamd",
                "bad selinux: | var_t | semanage fcontext -a -t antivirus_db_t '/srv/clamav(/.*)?'",
            ],
        );
        let local = format!("{debian}# /srv/x/** r,\n/srv/clamav/** r,\n");
        check(
            Some(&local),
            Some((false, Some("system_u:object_r:antivirus_db_t:s0"))),
            ["good apparmor", "good selinux: | labelled"],
        );
        check(
            Some(&debian),
            Some((true, None)),
            ["bad apparmor", "good selinux: | is on"],
        );
    }

    #[test]
    fn what_is_installed_but_does_not_enforce_confines_nothing() {
        let root = tempfile::tempdir().unwrap();
        let host = Host::below(root.path());
        let write = |path: &str, text: &str| host.write(path, text);
        let look = || {
            let found = Confinement::look(&host, root.path());
            (
                found.apparmor.is_some(),
                found.selinux.map(|s| s.scan_system),
            )
        };
        assert_eq!(look(), (false, None));
        write(PROFILE, DEBIAN);
        write("/sys/fs/selinux/enforce", "0");
        assert_eq!(look(), (false, None));
        write("/sys/module/apparmor/parameters/enabled", "Y\n");
        write("/sys/fs/selinux/enforce", "1");
        assert_eq!(look(), (true, Some(false)));
        write("/sys/fs/selinux/booleans/antivirus_can_scan_system", "1 1");
        write(
            PROFILE,
            &DEBIAN.replace("clamd {", "clamd flags=(complain) {"),
        );
        assert_eq!(look(), (false, Some(true)));
        write(PROFILE, DEBIAN);
        write(DISABLED, "");
        assert_eq!(look(), (false, Some(true)));
    }
}
