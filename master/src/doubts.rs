//! What is probably not meant in a configuration that could run.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::unistd::Group;

use crate::config::Config;
use crate::{endpoint, revoked};

/// Looks at what the configuration names and returns a sentence for each doubt, with the next step.
/// Nothing is changed.
pub fn doubts(config: &Config) -> Vec<String> {
    let mut doubts = Vec::new();
    let mirror = &config.mirror.path;
    match fs::metadata(mirror) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => doubts.push(format!("the mirror {} is no directory", mirror.display())),
        Err(error) => doubts.push(format!(
            "the mirror {} cannot be looked at ({error}); nothing is published until it can",
            mirror.display()
        )),
    }
    let group = &config.listen.admin_group;
    if matches!(Group::from_name(group), Ok(None)) {
        doubts.push(format!(
            "there is no group `{group}` (listen.admin_group): only root and the daemon's own user \
             may command it; `groupadd --system {group}`"
        ));
    }
    let signing = &config.signing;
    for key in [&signing.manifest_key, &signing.audit_key, &config.tls.key] {
        if fs::metadata(key).is_ok_and(|found| found.mode() & 0o077 != 0) {
            let key = key.display();
            doubts.push(format!(
                "others may read the private key {key}; `chmod 600 {key}`"
            ));
        }
    }
    // A CA that cannot be read is an error, told elsewhere.
    if let Ok((_, ca)) = endpoint::load_ca(&config.tls.ca) {
        doubts.extend(revoked::objection(
            &config.tls.revoked,
            &config.fleet,
            &ca.key,
        ));
    }
    if within(&config.state, mirror) || within(mirror, &config.state) {
        doubts.push(format!(
            "the state directory {} and the mirror {} are one inside the other; give each its own",
            config.state.display(),
            mirror.display()
        ));
    }
    doubts
}

fn within(inner: &Path, outer: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(inner).starts_with(real(outer))
}
