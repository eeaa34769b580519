//! Decides nothing: the table of the keys of `agent.toml`.
//! The parser, its messages, the manual page and the example configuration use this table.
//! Must not know how a value is used.

use clamcast_daemon::config::{Key, Value};

/// Every key, in the order of the manual.
pub const KEYS: &[Key] = &[
    Key {
        name: "master",
        value: Value::Required("[\"mirror.example.net:7310\"]"),
        expected: "1 to 16 addresses of the master with their ports, such as [\"mirror.example.net:7310\"]",
        meaning: "The addresses of the one master. The agent tries them in order.",
    },
    Key {
        name: "proxy",
        value: Value::Reserved("\"\""),
        expected: "an address with its port such as \"proxy.example.net:3128\", or \"\" for none",
        meaning: "An HTTP proxy for TCP connections.",
    },
    Key {
        name: "state",
        value: Value::Required("\"/var/lib/clamcast/agent\""),
        expected: "a directory such as \"/var/lib/clamcast/agent\", neither within `database.path` nor around it",
        meaning: "The state directory: the trusted key set, unacknowledged receipts and the local audit log.",
    },
    Key {
        name: "tls.ca",
        value: Value::Required("\"ca.pem\""),
        expected: "a file such as \"ca.pem\"",
        meaning: "The certificate of the fleet's CA.",
    },
    Key {
        name: "tls.cert",
        value: Value::Required("\"cert.pem\""),
        expected: "a file such as \"cert.pem\"",
        meaning: "The host's certificate chain.",
    },
    Key {
        name: "tls.key",
        value: Value::Required("\"key.pem\""),
        expected: "a file such as \"key.pem\"",
        meaning: "The private key of the host's certificate. The systemd credential `tls.key` replaces this file.",
    },
    Key {
        name: "trust.keys",
        value: Value::Required("\"manifest.pub\""),
        expected: "a file such as \"manifest.pub\"",
        meaning: "The key set. The agent pins the root key that it sees here first. Newer key sets arrive from the master, signed by that root key.",
    },
    Key {
        name: "trust.stale",
        value: Value::Default("\"warn\""),
        expected: "\"warn\" or \"refuse\"",
        meaning: "Whether the agent installs a generation whose freshness statement expired: with a warning, or not at all.",
    },
    Key {
        name: "listen.admin",
        value: Value::Default("\"/run/clamcast/agent.sock\""),
        expected: "a path such as \"/run/clamcast/agent.sock\", with its directories at most 107 bytes long",
        meaning: "The socket for the operators' commands.",
    },
    Key {
        name: "database.path",
        value: Value::Required("\"/var/lib/clamav\""),
        expected: "a directory such as \"/var/lib/clamav\"",
        meaning: "The database directory of clamd. The agent's user owns it.",
    },
    Key {
        name: "database.drift",
        value: Value::Default("\"repair\""),
        expected: "\"repair\" or \"report\"",
        meaning: "Whether the agent repairs a changed database, or only reports it.",
    },
    Key {
        name: "database.rescan",
        value: Value::Default("\"1h\""),
        expected: "a length of time from \"1s\" to \"365d\", such as \"1h\"",
        meaning: "Time between two complete checks of all installed files.",
    },
    Key {
        name: "clamd.config",
        value: Value::Default("\"auto\""),
        expected: "a file such as \"/etc/clamav/clamd.conf\", \"auto\", or \"\" for none",
        meaning: "The path of clamd.conf, from which the agent reads sockets, log, user and VirusEvent. With `\"\"` only this file counts.",
    },
    Key {
        name: "clamd.socket",
        value: Value::Default("\"/run/clamav/clamd.ctl\""),
        expected: "1 to 16 sockets, each a path from / on or \"host:port\", such as \"/run/clamav/clamd.ctl\"; \
             or \"none\" for no clamd",
        meaning: "clamd's socket, or several sockets of clamds on one directory. With `\"none\"` there is no clamd, and installed counts as live. The default is used if clamd.conf names no socket.",
    },
    Key {
        name: "clamd.reload",
        value: Value::Default("\"socket\""),
        expected: "\"socket\" or \"signal\"",
        meaning: "Whether the agent makes clamd reload by its socket or by a signal.",
    },
    Key {
        name: "clamd.pid_file",
        value: Value::Default("\"/run/clamav/clamd.pid\""),
        expected: "a file such as \"/run/clamav/clamd.pid\"",
        meaning: "clamd's PID file, for `reload = \"signal\"`. The default is used if clamd.conf names none.",
    },
    Key {
        name: "clamd.proof",
        value: Value::Default("\"canary\""),
        expected: "\"canary\" or \"version\"",
        meaning: "How clamd proves that it scans with the installed set: by a sample that only this install detects, or by its version.",
    },
    Key {
        name: "clamd.deadline",
        value: Value::Default("\"5m\""),
        expected: "a length of time above zero, such as \"5m\"",
        meaning: "How long clamd may take to prove an install.",
    },
    Key {
        name: "clamd.splay",
        value: Value::Default("\"0s\""),
        expected: "a length of time such as \"0s\" or \"30s\"",
        meaning: "The agent waits a random part of this time before the reload, so that many guests of one machine do not reload at once.",
    },
];
