//! What stands at the end of each command's `--help`: exit codes, files, examples. A paragraph is one
//! line, which clap wraps to the terminal.

pub(crate) const MASTER: &str = "\
Exit codes:
  0  done; status, agents and generations: they could answer
  1  something does not conform, or a wait timed out: publish --wait, force-sync, audit verify
  2  wrong usage or configuration
  3  the daemon cannot be reached
  4  refused: not authorised, not trusted, publishing held
  5  failed: disk, network, a bug

Files:
  /etc/clamcast/master.toml   configuration; --config FILE for another
  /run/clamcast/master.sock   where the daemon takes commands; --socket PATH for another, which is
                              `admin` under [listen] in the configuration
  /var/lib/clamcast/master    `state` in the configuration: what was published, what is known of each
                              agent, and audit/log.jsonl

Environment:
  NO_COLOR          no colours, also on a terminal (a pipe never gets any)
  CLICOLOR_FORCE=1  colours, also into a pipe
  CLAMCAST_LOG      what serve logs, instead of -v: for example debug, or info,clamcast_master=trace

`clamcast-master COMMAND --help` has examples.";

pub(crate) const SERVE: &str = "\
Exit codes:
  0  stopped by a signal
  2  the configuration, a key or a certificate cannot be used; the message says which
  5  failed: the port or the socket is taken, another daemon has the state directory, the disk

Files:
  /etc/clamcast/master.toml   configuration; paths in it are relative to it
  /var/lib/clamcast/master    state, one daemon at a time

Examples:
  systemctl enable --now clamcast-master
  systemctl reload clamcast-master           after a change of configuration, keys or certificates
  clamcast-master -v serve --config master.toml";

pub(crate) const CHECK_CONFIG: &str = "\
Exit codes:
  0  good; what is doubtful, or has no effect in this version, is named
  2  not good; the message says line and key, and what was expected

Example:
  clamcast-master check-config && systemctl reload clamcast-master";

pub(crate) const PUBLISH: &str = "\
Exit codes:
  0  published, or what the mirror holds is published already
  1  with --wait: an agent did not take it; the output names it and says why
  4  nothing new was published, because all of it is held or refused; the output says why
  5  failed: the mirror changes all the time, disk

Examples:
  clamcast-master publish
  clamcast-master publish --wait
  clamcast-master publish --dry-run
  clamcast-master publish --accept 'main was cut by Talos, ticket 4711' official";

pub(crate) const ROLLOUT: &str = "\
A wave is settled when all of its connected members have answered, or at its deadline; in both cases half \
of the members that were connected since it began, and at least one, must have proven the generation live. \
Members that it leaves behind are stragglers: they catch up. A refusal is weighed against the proofs of the \
same ClamAV version: with two proofs and more proofs than refusals the hosts that refused are set aside; \
otherwise that version is not offered the generation any more, and where no other version is left the \
rollout halts. Trouble of hosts only pauses it, at most until the wave's deadline if half have proven it.

Exit codes:
  0  done; `status`: complete, or without --timeout on its way or paused
  1  `status`: halted or aborted, or not complete when the time was over; with --timeout both are told
     once who is there is back, where hosts go back
  2  there is no such generation
  3  the daemon cannot be reached; `status --timeout` waits for one that has answered before
  4  refused: nothing is running, nothing is paused, an operator has paused it already (it says why), the
     group is not pinned or is past the generation, the host is not enrolled or not set aside

Examples:
  clamcast-master rollout status --timeout 10m
  clamcast-master rollout pause --reason 'change freeze until Monday'
  clamcast-master rollback 1.41 --reason 'false positives, ticket 4711'
  clamcast-master rollout set-aside web7 --reason 'disk is failing'
  clamcast-master pin db 1.41";

pub(crate) const STATUS: &str = "\
GENERATION is EPOCH.NUMBER. An agent is conformant when its clamd was seen scanning with what it \
is wanted at (`rollout status`: the others may be at the one before) and every file has its hash; behind when it is not there yet; failed when it said that \
it cannot, or gave no sign of progress for a quarter of an hour. Up to 20 that are not conformant, or \
away, are named; `agents` has all.

Exit codes:
  0  it could answer, whatever the answer is
  3  the daemon cannot be reached; with --watch it is waited for

Examples:
  clamcast-master status
  clamcast-master status --watch
  clamcast-master status --json | jq -e '.agents.failed == 0'";

pub(crate) const AGENTS: &str = "\
GENERATION  what it has; `pinned`: a group of it is kept at one (`rollout status`)
LIVE        yes: clamd was seen scanning with GENERATION
OUTCOME     what the agent does (fetching, staged, swapping, reloading, proving), or what came of the
            last generation: live, installed (clamd was not seen with it yet), refused (clamd cannot use
            it), host_fault (disk, rights, space), declined
SINCE       age of its last receipt, or how long ago it came or went

`adopted` lines name files that hosts had of their own under a name of the fleet: the agent keeps them,
and restores them when the fleet withdraws the name.

Exit codes:
  0  it could answer

Examples:
  clamcast-master agents
  clamcast-master agents | grep -w down
  clamcast-master agents --json | jq -r '.[] | select(.conformant | not) | .name'";

pub(crate) const GENERATIONS: &str = "\
FILES are named with their versions. A .cvd or .cld without a mark is signed by Talos; (unsigned) files carry \
no signature that says who made them, and an earlier build published (not verified) ones. STATE is running (on its way through the fleet), waiting (for \
that), current (what everybody else is wanted at), superseded, halted, aborted or rolled_back.

Exit codes:
  0  it could answer

Example:
  clamcast-master generations --json | jq '.[-1].files'";

pub(crate) const FORCE_SYNC: &str = "\
Exit codes:
  0  every agent is live with the current generation
  1  one is not; the table says which and why
  2  no such agent or group
  4  the generation is not current and was not taken back

Examples:
  clamcast-master force-sync web1 'db-*'
  clamcast-master force-sync --group canary --timeout 2m
  clamcast-master force-sync --all --no-wait
  clamcast-master force-sync web1 --full --json
  clamcast-master force-sync web1 --generation 1.42 --accept 'to see what clamd has against it'";

pub(crate) const AUDIT_SHOW: &str = "\
A record says what happened (EVENT), to what (SUBJECT, GENERATION), what came of it (OUTCOME), and who \
did it (ACTOR: operator:UID/NAME, agent:NAME, master). Columns for which a terminal is too narrow stand \
beneath their record; in a pipe a record is one line. Digests are cut short, and receipts are told by \
their outcome: --json has all of it. Several filters restrict together.

Exit codes:
  0  done, also if no record matches, which is said on stderr
  2  no such event, not a time, not a pattern
  5  the log cannot be read

Examples:
  clamcast-master audit show --since 24h --agent web1
  clamcast-master audit show --since 2026-11-22 --event force-sync --operator root
  clamcast-master audit show --agent 'db-*' --event receipt --json | jq -r .outcome | sort | uniq -c
  clamcast-master audit show --follow";

pub(crate) const AUDIT_VERIFY: &str = "\
Exit codes:
  0  every record is as it was signed
  1  one is not; the output says which line, and how
  2  the configuration or the keys cannot be read
  5  the log cannot be read

Files:
  STATE/audit/log.jsonl    the records, one a line
  STATE/audit/checkpoint   their number and Merkle tree head, signed with the audit key
  STATE/audit/leaves       the records' hashes, by which the changed one is found

Examples:
  clamcast-master audit verify
  clamcast-master audit verify --state /backup/master --keys manifest.pub --json";
