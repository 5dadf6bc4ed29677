//! What the settings for hosts and web pages may say.
//!
//! Owns their form. Never judges a request. The thing to know: an entry that could never match is
//! refused at start, since nobody would notice it later.

/// Why these are no host names, if they are not: a name, an address, `*.` and a name, or `*`.
pub(super) fn wrong_host(hosts: &[String]) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:[]".contains(c);
    let has_port = |h: &str| match h.starts_with('[') {
        true => !h.ends_with(']'),
        false => h.matches(':').count() == 1,
    };
    let right = |h: &str| {
        let name = h.strip_prefix("*.").unwrap_or(h);
        h == "*"
            || (!name.is_empty()
                && name.chars().all(plain)
                && !has_port(name)
                && !name.ends_with('.'))
    };
    let wrong = hosts.iter().find(|h| !right(h))?;
    Some(format!("has '{wrong}'; expected host names without scheme and port, e.g. box.lan"))
}

/// Why these are no origins, if they are not; `keyed` says that everyone needs a key.
pub(super) fn wrong_origin(origins: &[String], keyed: bool) -> Option<String> {
    let right = |origin: &str| {
        let Some((scheme, rest)) = origin.split_once("://") else { return false };
        let plain = |c: char| c.is_ascii_graphic() && !"/?#@*,\"'".contains(c);
        !scheme.is_empty() && !rest.is_empty() && origin.len() <= 300 && rest.chars().all(plain)
    };
    if let Some(wrong) = origins.iter().find(|o| *o != "*" && !right(o)) {
        return Some(format!(
            "has '{wrong}'; expected scheme, host and port, e.g. https://chat.example or \
             http://localhost:3000"
        ));
    }
    let open = !keyed && origins.iter().any(|o| o == "*");
    open.then(|| {
        "has '*', which lets every web page call a server without keys; name the origins, or set \
         an API key"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_could_never_match_are_refused() {
        let hosts = |h: &str| wrong_host(&[h.to_owned()]).is_some();
        for right in ["box.lan", "*.lan", "*", "10.0.0.1", "[fe80::1]", "fe80::1"] {
            assert!(!hosts(right), "{right}");
        }
        for wrong in ["", "http://box", "box:80", "a b", "*.", "a/b", "[::1]:80", "box.lan."] {
            assert!(hosts(wrong), "{wrong}");
        }
        let origins = |o: &str, keyed| wrong_origin(&[o.to_owned()], keyed).is_some();
        for right in ["https://chat.example", "http://localhost:3000", "app://obsidian.md"] {
            assert!(!origins(right, false), "{right}");
        }
        for wrong in ["", "null", "chat.example", "https://a/", "https://", "https://*.a", "//a"] {
            assert!(origins(wrong, true), "{wrong}");
        }
        assert!(origins("*", false) && !origins("*", true));
    }
}
