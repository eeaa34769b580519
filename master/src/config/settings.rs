//! Decides nothing: the table of the keys of `master.toml`.
//! The parser, its messages, the manual page and the example configuration use this table.
//! Must not know how a value is used.

use clamcast_daemon::config::{Key, Value};

/// Every key, in the order of the manual.
pub const KEYS: &[Key] = &[
    Key {
        name: "fleet",
        value: Value::Required("\"example\""),
        expected: "the fleet's name as `clamcast-certs init --fleet` was given it, such as \"example\": \
             letters, digits, `.`, `_` and `-`, first and last a letter or digit",
        meaning: "The fleet's name. Every certificate and signed statement of the fleet carries it.",
    },
    Key {
        name: "state",
        value: Value::Required("\"/var/lib/clamcast/master\""),
        expected: "a directory such as \"/var/lib/clamcast/master\", neither within `mirror.path` nor around it",
        meaning: "The state directory: the store, the rollout, what the master knows of each agent, and the audit log. One master at a time uses it.",
    },
    Key {
        name: "mirror.path",
        value: Value::Required("\"/var/lib/clamav\""),
        expected: "a directory such as \"/var/lib/clamav-mirror\"",
        meaning: "The directory that freshclam or cvdupdate writes. The master only reads it. It may be a symbolic link.",
    },
    Key {
        name: "mirror.quiet",
        value: Value::Default("\"3s\""),
        expected: "a length of time up to \"1h\", such as \"3s\"",
        meaning: "The master captures the mirror when nothing has changed for this long and no freshclam run is open.",
    },
    Key {
        name: "mirror.rescan",
        value: Value::Default("\"5m\""),
        expected: "a length of time from \"1s\" to \"1d\", such as \"5m\"",
        meaning: "Time between full looks at the mirror, in case a file event was lost.",
    },
    Key {
        name: "mirror.require",
        value: Value::Default("[\"daily\"]"),
        expected: "a list of database names without their extension, such as [\"daily\"], or [] for none",
        meaning: "Databases without which the master publishes nothing.",
    },
    Key {
        name: "mirror.unsigned",
        value: Value::Default("\"allow\""),
        expected: "\"allow\" or \"refuse\"",
        meaning: "Whether the master publishes .cud and loose files, which carry no signature. A .cvd or .cld always needs a valid signature of Talos.",
    },
    Key {
        name: "mirror.load_test",
        value: Value::Default("\"auto\""),
        expected: "\"auto\", \"always\" or \"never\"",
        meaning: "Whether the master loads each capture with clamscan before it publishes the capture: if clamscan is installed, always, or never.",
    },
    Key {
        name: "mirror.shrink_max",
        value: Value::Default("\"30%\""),
        expected: PERCENT,
        meaning: "The master holds a unit for an operator if a database of it lost more than this share of its size. Allow-lists may shrink.",
    },
    Key {
        name: "mirror.on_bad_unit",
        value: Value::Default("\"hold\""),
        expected: "\"hold\" or \"refuse\"",
        meaning: "What a unit that fails a check means for the other units: they are published with the last published version of that unit, or nothing is published.",
    },
    Key {
        name: "mirror.cvd_certs",
        value: Value::Default("\"\""),
        expected: "a directory such as \"/etc/clamav/certs\", or \"\" for none",
        meaning: "ClamAV's certificates directory. With it the master verifies each .cvd.sign and publishes only valid ones.",
    },
    Key {
        name: "mirror.age_alarm",
        value: Value::Default("\"48h\""),
        expected: "a length of time such as \"48h\"",
        meaning: "Signatures, or a hold, older than this raise an alarm.",
    },
    Key {
        name: "mirror.units.*",
        value: Value::Named("urlhaus = [\"urlhaus.ndb\", \"urlhaus.ign2\"]"),
        expected: "a list of file names such as [\"urlhaus.ndb\", \"urlhaus.ign2\"]",
        meaning: "Loose files that are published or held together.",
    },
    Key {
        name: "listen.quic",
        value: Value::Default("\"[::]:7310\""),
        expected: "an IP address and a port such as \"192.0.2.1:7310\", or \"[::]:7310\" for every address",
        meaning: "The UDP address where agents connect.",
    },
    Key {
        name: "listen.tcp",
        value: Value::Reserved("\"\""),
        expected: "an IP address and a port such as \"[::]:443\", or \"\" for none",
        meaning: "A TCP address for hosts where UDP is blocked.",
    },
    Key {
        name: "listen.admin",
        value: Value::Default("\"/run/clamcast/master.sock\""),
        expected: "a path such as \"/run/clamcast/master.sock\", with its directories at most 107 bytes long",
        meaning: "The socket for the operators' commands.",
    },
    Key {
        name: "listen.admin_group",
        value: Value::Default("\"clamcast\""),
        expected: "the name of a group such as \"clamcast\"",
        meaning: "The group whose members may issue commands, besides root and the daemon's own user.",
    },
    Key {
        name: "listen.http",
        value: Value::Reserved("\"127.0.0.1:7311\""),
        expected: "an IP address and a port such as \"127.0.0.1:7311\", or \"\" for none",
        meaning: "The address for metrics and the status page.",
    },
    Key {
        name: "listen.audit_group",
        value: Value::Reserved("\"\""),
        expected: "the name of a group such as \"auditors\", or \"\" for none",
        meaning: "A group that may only read.",
    },
    Key {
        name: "listen.two_person",
        value: Value::Reserved("false"),
        expected: "true or false, without quotes",
        meaning: "Whether dangerous commands need a second operator.",
    },
    Key {
        name: "mirror_http.listen",
        value: Value::Reserved("\"\""),
        expected: "an IP address and a port such as \"[::]:8080\", or \"\" for none",
        meaning: "The address of a mirror for hosts without an agent.",
    },
    Key {
        name: "mirror_http.cert",
        value: Value::Reserved("\"\""),
        expected: "a file such as \"/etc/clamcast/http/cert.pem\", or \"\" for none",
        meaning: "The certificate of that mirror.",
    },
    Key {
        name: "mirror_http.key",
        value: Value::Reserved("\"\""),
        expected: "a file such as \"/etc/clamcast/http/key.pem\", or \"\" for none",
        meaning: "The key of that certificate.",
    },
    Key {
        name: "audit.keep",
        value: Value::Reserved("\"400d\""),
        expected: "a length of time up to \"3650d\", such as \"400d\"",
        meaning: "How long audit records are kept.",
    },
    Key {
        name: "tls.ca",
        value: Value::Required("\"/etc/clamcast/ca.pem\""),
        expected: "a file such as \"/etc/clamcast/ca.pem\"",
        meaning: "The certificate of the fleet's CA.",
    },
    Key {
        name: "tls.cert",
        value: Value::Required("\"/etc/clamcast/master/cert.pem\""),
        expected: "a file such as \"/etc/clamcast/master/cert.pem\"",
        meaning: "The master's certificate chain.",
    },
    Key {
        name: "tls.key",
        value: Value::Required("\"/etc/clamcast/master/key.pem\""),
        expected: "a file such as \"/etc/clamcast/master/key.pem\"",
        meaning: "The private key of the master's certificate. The systemd credential `tls.key` replaces this file.",
    },
    Key {
        name: "tls.revoked",
        value: Value::Default("\"/etc/clamcast/revoked.json\""),
        expected: "a file such as \"/etc/clamcast/revoked.json\"",
        meaning: "The revocation list, signed by the CA. Without this file no certificate is revoked. If the file is damaged, the last good list stays in force, with an alarm.",
    },
    Key {
        name: "signing.manifest_key",
        value: Value::Required("\"/etc/clamcast/manifest.key\""),
        expected: "a file such as \"/etc/clamcast/manifest.key\"",
        meaning: "The private key that signs manifests. The systemd credential `signing.manifest_key` replaces this file.",
    },
    Key {
        name: "signing.audit_key",
        value: Value::Required("\"/etc/clamcast/audit.key\""),
        expected: "a file such as \"/etc/clamcast/audit.key\"",
        meaning: "The private key that signs the heads of the audit log. The systemd credential `signing.audit_key` replaces this file.",
    },
    Key {
        name: "signing.keys",
        value: Value::Required("\"/etc/clamcast/manifest.pub\""),
        expected: "a file such as \"/etc/clamcast/manifest.pub\"",
        meaning: "The key set that the root key signed, as the agents have it.",
    },
    Key {
        name: "signing.fresh",
        value: Value::Default("\"48h\""),
        expected: "a length of time from \"1m\" to \"365d\", such as \"48h\"",
        meaning: "How long a freshness statement is valid. The master issues the next statement in time.",
    },
    Key {
        name: "groups.*",
        value: Value::Named("canary = [\"web1\", \"db-*\"]"),
        expected: "a list of agents' names or patterns such as [\"web1\", \"db-*\", \"app[0-9]\"]",
        meaning: "Agent names or patterns that belong to a group. They add to the groups in the certificates.",
    },
    Key {
        name: "store.keep",
        value: Value::Default("20"),
        expected: "a whole number from 1 on, such as 20",
        meaning: "The number of generations that the store keeps. Objects and deltas that none of them needs are deleted.",
    },
    Key {
        name: "push.concurrent",
        value: Value::Default("64"),
        expected: "a whole number from 1 on, such as 64",
        meaning: "The number of bulk transfers at a time.",
    },
    Key {
        name: "push.bandwidth",
        value: Value::Reserved("\"0\""),
        expected: "a number of bytes a second such as \"500kB\" or \"64MiB\", or \"0\" for no limit",
        meaning: "A limit on the bytes that the master sends in a second.",
    },
    Key {
        name: "bulk.urls.*",
        value: Value::Reserved("site-a = [\"https://cache.example.net/clamcast\"]"),
        expected: "a list of URLs such as [\"https://cache.example.net/clamcast\"]",
        meaning: "Caches from which the agents of a group may fetch objects and deltas.",
    },
    Key {
        name: "bulk.upload",
        value: Value::Reserved("\"\""),
        expected: "a bucket such as \"s3://BUCKET/PREFIX\", or \"\" for none",
        meaning: "A bucket for objects and deltas.",
    },
    Key {
        name: "rollout.waves",
        value: Value::Default("[\"group:canary\", \"10%\", \"100%\"]"),
        expected: "a list of groups, shares and counts such as [\"group:canary\", \"10%\", \"100%\"]",
        meaning: "The waves of a rollout, in order: groups, percentages of the connected agents, or counts. A last wave of all agents is always added.",
    },
    Key {
        name: "rollout.settle",
        value: Value::Default("\"0s\""),
        expected: "a length of time such as \"0s\" or \"30m\"",
        meaning: "Wait between the end of a wave and the beginning of the next.",
    },
    Key {
        name: "rollout.refused_max",
        value: Value::Default("\"2%\""),
        expected: PERCENT,
        meaning: "The rollout halts if more than this share of the agents, and more than one, refuse the generation after the first wave.",
    },
    Key {
        name: "rollout.unwell_max",
        value: Value::Default("\"20%\""),
        expected: PERCENT,
        meaning: "The rollout pauses if more than this share of a wave, and more than one agent, report faults of their own hosts.",
    },
    Key {
        name: "rollout.rollback_on_halt",
        value: Value::Default("true"),
        expected: "true or false, without quotes",
        meaning: "Whether agents that took a halted generation go back to the previous set.",
    },
    Key {
        name: "rollout.deadline",
        value: Value::Default("\"15m\""),
        expected: "a length of time above zero and up to \"365d\", such as \"15m\"",
        meaning: "The deadline of a wave. Real progress extends the deadline of a member to twice this at most.",
    },
    Key {
        name: "rollout.windows.*",
        value: Value::Named("db = [\"Mon-Fri 22:00-05:00\"]"),
        expected: "a list of times such as [\"Mon-Fri 22:00-05:00\"]",
        meaning: "Times at which the members of a group may be offered a generation.",
    },
];

const PERCENT: &str = "a whole percentage from \"0%\" to \"100%\"";
