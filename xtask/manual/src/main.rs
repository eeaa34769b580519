//! Writes the manual pages, completions and example configurations that the packages contain.
//!
//! `clamcast-manual DIR DATE` writes `DIR/PROGRAM/{man1,man5,bash,zsh,fish,examples}`. The command lines
//! and the tables of configuration keys are those that the programs parse with.

mod settings;

use std::path::Path;
use std::{env, fs};

use anyhow::Context as _;
use clamcast_agent::config as agent;
use clamcast_agent::operate::cli::Cli as AgentCli;
use clamcast_master::config as master;
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use settings::Page;

/// The configuration file of the master.
const MASTER: Page = Page {
    program: "clamcast-master",
    file: "master.toml",
    path: master::DEFAULT_PATH,
    reload: "systemctl reload clamcast-master",
    keys: master::KEYS,
};

/// The configuration file of the agent.
const AGENT: Page = Page {
    program: "clamcast-agent",
    file: "agent.toml",
    path: agent::DEFAULT_PATH,
    reload: "systemctl reload clamcast-agent",
    keys: agent::KEYS,
};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [directory, date] = &arguments[..] else {
        anyhow::bail!("usage: clamcast-manual DIR DATE");
    };
    let directory = Path::new(directory);
    let programs = [
        (clamcast_master::operate::command_line(), Some(MASTER)),
        (AgentCli::command(), Some(AGENT)),
        (clamcast_certs::cli::command_line(), None),
    ];
    for (command, page) in programs {
        let name = command.get_name().to_owned();
        write(&directory.join(&name), command, page.as_ref(), date)
            .with_context(|| format!("cannot write the manual of {name}"))?;
    }
    Ok(())
}

/// Writes everything for one program into `directory`.
fn write(
    directory: &Path,
    command: Command,
    page: Option<&Page>,
    date: &str,
) -> anyhow::Result<()> {
    let program = command.get_name().to_owned();
    let place = |name: &str| {
        let place = directory.join(name);
        fs::create_dir_all(&place).map(|()| place)
    };
    for (shell, name) in [
        (Shell::Bash, "bash"),
        (Shell::Zsh, "zsh"),
        (Shell::Fish, "fish"),
    ] {
        let path = clap_complete::generate_to(shell, &mut command.clone(), &program, place(name)?)?;
        if shell == Shell::Bash {
            // The functions of clap_complete escape the hyphen of a program's name in two ways.
            let escaped = program.replace('-', "__subcmd__");
            let text = fs::read_to_string(&path)?;
            let text = text.replace(&escaped, &program.replace('-', "__"));
            // bash-completion looks for the name of the command.
            fs::write(path.with_extension(""), text)?;
            fs::remove_file(path)?;
        }
    }
    let man1 = place("man1")?;
    let mut built = command.disable_help_subcommand(true);
    built.build();
    pages(&built, &program, date, &man1)?;
    if let Some(page) = page {
        let name = format!("{program}.toml.5");
        fs::write(place("man5")?.join(name), page.manual(date))?;
        fs::write(place("examples")?.join(page.file), page.example())?;
    }
    Ok(())
}

/// Writes the page of `command` as `NAME.1`, and those of its subcommands.
fn pages(command: &Command, name: &str, date: &str, man1: &Path) -> anyhow::Result<()> {
    let version = format!("clamcast {}", env!("CARGO_PKG_VERSION"));
    let subcommands = || command.get_subcommands().filter(|one| !one.is_hide_set());
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .date(date)
        .source(version)
        .manual("clamcast manual");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if command.get_arguments().any(|one| !one.is_hide_set()) {
        man.render_options_section(&mut page)?;
    }
    if subcommands().next().is_some() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(help) = command.get_after_long_help() {
        after_help(&help.to_string()).to_writer(&mut page)?;
    }
    fs::write(man1.join(format!("{name}.1")), page)?;
    for subcommand in subcommands() {
        let name = format!("{name}-{}", subcommand.get_name());
        pages(subcommand, &name, date, man1)?;
    }
    Ok(())
}

/// The text after the options of `--help`: a paragraph that begins with `Title:` is a section, whose
/// lines are aligned by hand.
fn after_help(text: &str) -> Roff {
    let mut roff = Roff::new();
    for paragraph in text.split("\n\n") {
        match paragraph.split_once(":\n") {
            Some((title, lines)) => {
                roff.control("SH", [title.to_uppercase().as_str()]);
                roff.control("nf", []);
                for line in lines.lines() {
                    let line = line.strip_prefix("  ").unwrap_or(line);
                    roff.text([roman(line)]);
                }
                roff.control("fi", []);
            }
            None => {
                roff.control("PP", []);
                roff.text([roman(paragraph)]);
            }
        }
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bash_completes_subcommands_of_subcommands() {
        let directory = tempfile::tempdir().unwrap();
        let command = clamcast_master::operate::command_line();
        write(directory.path(), command, None, "2026-01-01").unwrap();
        let script = "source \"$0\"
            COMP_WORDS=(clamcast-master rollout pa)
            COMP_CWORD=2
            _clamcast__master clamcast-master pa rollout
            echo \"${COMPREPLY[@]}\"";
        let mut bash = std::process::Command::new("bash");
        bash.args(["--norc", "-c", script]);
        let ran = bash.arg(directory.path().join("bash/clamcast-master"));
        let printed = ran.output().unwrap().stdout;
        assert_eq!(String::from_utf8(printed).unwrap(), "pause\n");
    }
}
