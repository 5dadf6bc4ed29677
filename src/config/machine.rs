//! What this machine offers, for the defaults that depend on it.
//!
//! Owns the look-ups. Never decides a limit. The thing to know: in a container the cgroup's limit
//! counts, not the host's.

use super::size::Size;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use sysinfo::System;

/// Bytes that can be taken now without swapping.
pub fn memory_available() -> u64 {
    // A machine that cannot be asked counts as full.
    let Ok(mut system) = System::new() else { return 0 };
    system.refresh_memory();
    let free = system.available_memory();
    match system.cgroup_limits() {
        Some(limits) if limits.total_memory < system.total_memory() => {
            free.min(limits.total_memory.saturating_sub(limits.rss))
        }
        _ => free,
    }
}

/// One `part`th of what is available, within bounds.
pub(super) fn memory_share(part: u64, bounds: RangeInclusive<u64>) -> Size {
    Size((memory_available() / part).clamp(*bounds.start(), *bounds.end()))
}

/// Physical cores this process may use: hyper-threads share the units that serving saturates.
pub(super) fn cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    let physical = System::physical_core_count().unwrap_or(allowed);
    physical.clamp(1, allowed)
}

/// `$XDG_DATA_HOME/polylora/<model>`: adapters belong to one base model, so each has a directory.
pub(super) fn data_dir(model: &str) -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let home = set("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| set("HOME").map(|h| PathBuf::from(h).join(".local/share")))
        .unwrap_or_else(|| PathBuf::from("."));
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '-' }
    };
    let name: String = model.trim_matches(['/', '.']).chars().map(plain).collect();
    home.join("polylora").join(name)
}
