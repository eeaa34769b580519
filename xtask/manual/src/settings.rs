//! Renders a table of configuration keys as a manual page and as an example configuration.

use std::fmt::Write as _;

use clamcast_daemon::config::{Key, Value};
use clap_mangen::roff::{Inline, Roff, bold, roman};

/// A configuration file of one program.
pub(crate) struct Page {
    pub(crate) program: &'static str,
    pub(crate) file: &'static str,
    pub(crate) path: &'static str,
    pub(crate) reload: &'static str,
    pub(crate) keys: &'static [Key],
}

/// Columns of the text in an example.
const WIDTH: usize = 98;

impl Page {
    /// The manual page in section 5, in roff.
    pub(crate) fn manual(&self, date: &str) -> String {
        let mut roff = Roff::new();
        let title = format!("{}.toml", self.program).to_uppercase();
        let source = format!("clamcast {}", env!("CARGO_PKG_VERSION"));
        roff.control("TH", [&title, "5", date, &source, "clamcast manual"]);
        roff.control("SH", ["NAME"]);
        let name = format!("{}.toml - configuration of {0}", self.program);
        roff.text([roman(name)]);
        roff.control("SH", ["SYNOPSIS"]);
        roff.text([bold(self.path)]);
        roff.control("SH", ["DESCRIPTION"]);
        let formats = "The file is TOML. Durations are written like \"3s\", \"5m\" or \"48h\", sizes like \"64MiB\", \
             percentages like \"2%\". A relative path is relative to the directory of the file. An unknown \
             key is an error.";
        roff.text([roman(formats)]);
        roff.control("PP", []);
        roff.text([
            roman("A change takes effect with "),
            bold(self.reload),
            roman(". Keys and certificates that arrive as systemd credentials need a restart."),
        ]);
        let mut table = None;
        for key in self.keys.iter().filter(|key| !is_reserved(key)) {
            let (of, name) = split(key.name);
            if table != Some(of) {
                let title = if of.is_empty() {
                    "TOP LEVEL".to_owned()
                } else {
                    format!("TABLE [{of}]")
                };
                roff.control("SH", [title.as_str()]);
                table = Some(of);
            }
            roff.control("TP", []);
            let name = if name == "*" { "NAME" } else { name };
            roff.text([bold(name)]);
            roff.text([roman(key.meaning)]);
            roff.control("br", []);
            roff.text(value(key));
        }
        let reserved: Vec<_> = self.keys.iter().filter(|key| is_reserved(key)).collect();
        if !reserved.is_empty() {
            roff.control("SH", ["RESERVED KEYS"]);
            let names: Vec<_> = reserved.iter().map(|key| key.name).collect();
            let text = "This version accepts the following keys and ignores them, with a warning: ";
            roff.text([roman(text), roman(names.join(", ")), roman(".")]);
        }
        roff.control("SH", ["SEE ALSO"]);
        roff.text([bold(self.program), roman("(1)")]);
        roff.to_roff()
    }

    /// A configuration with every key. Required keys have an example value; the others stand in
    /// comments with their default.
    pub(crate) fn example(&self) -> String {
        let mut text = format!(
            "# {}: configuration of {}, see {1}.toml(5).\n\
             # Required keys are set to an example. The other keys show their default.\n",
            self.path, self.program
        );
        let mut table = "";
        for key in self.keys.iter().filter(|key| !is_reserved(key)) {
            let (of, name) = split(key.name);
            if of != table {
                let _ = write!(text, "\n[{of}]");
                table = of;
                text.push('\n');
            }
            text.push('\n');
            for line in textwrap::wrap(key.meaning, WIDTH) {
                let _ = writeln!(text, "# {line}");
            }
            let _ = match key.value {
                Value::Required(example) => writeln!(text, "{name} = {example}"),
                Value::Default(default) => writeln!(text, "#{name} = {default}"),
                Value::Named(example) | Value::Reserved(example) => writeln!(text, "#{example}"),
            };
        }
        let reserved: Vec<_> = self.keys.iter().filter(|key| is_reserved(key)).collect();
        if !reserved.is_empty() {
            text.push_str("\n# This version accepts the following keys and ignores them:\n");
        }
        for key in reserved {
            let Value::Reserved(value) = key.value else {
                continue;
            };
            let _ = match key.name.strip_suffix(".*") {
                Some(table) => writeln!(text, "# [{table}] {value}"),
                None => writeln!(text, "# {} = {value}", key.name),
            };
        }
        text
    }
}

fn is_reserved(key: &Key) -> bool {
    matches!(key.value, Value::Reserved(_))
}

/// The table of a key, and its name in the table.
fn split(name: &'static str) -> (&'static str, &'static str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

/// The line of a manual page about the value of `key`.
fn value(key: &Key) -> Vec<Inline> {
    let expected = format!("Value: {}.", key.expected);
    let (before, value) = match key.value {
        Value::Required(_) => return vec![roman(format!("Required. {expected}"))],
        Value::Default(default) => ("Default: ", default),
        Value::Named(example) => ("Example: ", example),
        Value::Reserved(_) => unreachable!("reserved keys have a section of their own"),
    };
    vec![
        roman(expected),
        roman(format!(" {before}")),
        bold(value),
        roman("."),
    ]
}

#[cfg(test)]
mod tests {
    use crate::{AGENT, MASTER};

    #[test]
    fn the_example_configurations_are_valid() {
        let directory = tempfile::tempdir().unwrap();
        let [master, agent] = [MASTER, AGENT].map(|page| {
            let path = directory.path().join(page.file);
            std::fs::write(&path, page.example()).unwrap();
            path
        });
        let master = clamcast_master::config::Config::load(&master).unwrap();
        let agent = clamcast_agent::config::Config::load(&agent).unwrap();
        assert!(master.without_effect.is_empty() && agent.without_effect.is_empty());
    }
}
