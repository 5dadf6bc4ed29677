//! Which host names and origins a request may name.
//!
//! Owns the judgement alone. Never answers. The thing to know: a page whose name is made to lead
//! here (DNS rebinding) cannot hide that name from `Host`, and a page of another site cannot leave
//! out `Origin`; so on a server without keys both must be known.

use http::uri::Authority;
use std::net::IpAddr;

/// What a server without keys answers to.
pub struct Names<'a> {
    /// The setting `host`.
    pub own: &'a str,
    /// The setting `allow_hosts`.
    pub allowed: &'a [String],
    /// The address that the connection came in on.
    pub local: Option<IpAddr>,
}

impl Names<'_> {
    /// Whether `host`, as in the header `Host`, is one of them. An address cannot be rebound, so it
    /// is right when it is this connection's own.
    pub fn include(&self, host: &str) -> bool {
        let Some(name) = name_of(host) else { return false };
        if same(&name, self.own) || self.allowed.iter().any(|a| matches(a, &name)) {
            return true;
        }
        match address(&name) {
            Some(address) => address.is_loopback() || self.local == Some(address),
            None => name == "localhost" || name.ends_with(".localhost"),
        }
    }
}

/// The host in lower case, without port and last dot; nothing if it cannot be one.
fn name_of(host: &str) -> Option<String> {
    let authority: Authority = host.parse().ok()?;
    let name = authority.host().to_ascii_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    let fits = !name.is_empty() && !host.contains('@');
    fits.then(|| name.to_owned())
}

fn address(name: &str) -> Option<IpAddr> {
    let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    Some(bare.parse::<IpAddr>().ok()?.to_canonical())
}

/// Whether a setting names this host; an address may be written in several ways.
fn same(name: &str, setting: &str) -> bool {
    let both = address(name).zip(address(setting));
    both.map_or_else(|| setting.eq_ignore_ascii_case(name), |(a, b)| a == b)
}

/// An entry of `allow_hosts`: a name, `*.` and a name, or `*`.
fn matches(entry: &str, name: &str) -> bool {
    match entry.strip_prefix('*') {
        Some("") => true,
        Some(end) => name.ends_with(&end.to_ascii_lowercase()),
        None => same(name, entry),
    }
}

/// Whether `origins`, the setting, lets pages of `origin` call the API.
pub fn allows(origins: &[String], origin: &str) -> bool {
    origins.iter().any(|o| o == "*" || o.eq_ignore_ascii_case(origin))
}

/// Whether a page of `origin` was loaded from `host`.
pub fn is_own(origin: &str, host: &str) -> bool {
    let Some((scheme, authority)) = origin.split_once("://") else { return false };
    let usual = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return false,
    };
    let bare = |text: &str| text.strip_suffix(usual).unwrap_or(text).to_ascii_lowercase();
    !authority.is_empty() && bare(authority) == bare(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names<'a>(own: &'a str, allowed: &'a [String]) -> Names<'a> {
        Names { own, allowed, local: Some(IpAddr::from([192, 168, 1, 5])) }
    }

    #[test]
    fn loopback_and_the_connections_own_address_are_known() {
        let names = names("127.0.0.1", &[]);
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "localhost.",
            "a.localhost:1",
            "127.0.0.1",
            "127.9.9.9:80",
            "[::1]",
            "[::1]:8080",
            "[::ffff:127.0.0.1]:8080",
            "192.168.1.5:8080",
        ] {
            assert!(names.include(host), "{host}");
        }
    }

    #[test]
    fn no_other_name_is() {
        let names = names("127.0.0.1", &[]);
        let long = "a".repeat(60_000);
        for host in [
            "",
            ":8080",
            "evil.example",
            "evil.example:8080",
            "localhost.evil.example",
            "notlocalhost",
            "127.0.0.1.nip.io",
            "127.0.0.1@evil.example",
            "evil.example@127.0.0.1",
            "evil.example#127.0.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "0.0.0.0:8080",
            "127.1",
            "2130706433",
            "0x7f000001",
            "[::]",
            "::1",
            "[fe80::1]",
            "192.168.1.6",
            "localhost, evil.example",
            "evil.example/localhost",
            "localhost\\.evil",
            &long,
        ] {
            assert!(!names.include(host), "{host}");
        }
    }

    #[test]
    fn settings_add_names() {
        let allowed = ["api.example".to_owned(), "*.Lan".to_owned(), "10.0.0.7".to_owned()];
        let names = names("Big-Box.example", &allowed);
        for host in ["big-box.example", "API.example:80", "a.b.lan", "10.0.0.7:9000"] {
            assert!(names.include(host), "{host}");
        }
        for host in ["lan", "x.api.example", "api.example.evil", "10.0.0.8", "evil-lan"] {
            assert!(!names.include(host), "{host}");
        }
        let any = ["*".to_owned()];
        assert!(Names { own: "0.0.0.0", allowed: &any, local: None }.include("evil.example"));
        assert!(Names { own: "0.0.0.0", allowed: &[], local: None }.include("0.0.0.0:8080"));
    }

    #[test]
    fn a_page_is_our_own_if_it_came_from_this_host_and_port() {
        assert!(is_own("http://localhost:8080", "LOCALHOST:8080"));
        assert!(is_own("http://localhost", "localhost:80"));
        assert!(is_own("https://chat.example", "chat.example"));
        for (origin, host) in [
            ("null", "localhost"),
            ("", ""),
            ("http://", ""),
            ("http://localhost:3000", "localhost:8080"),
            ("http://evil.example", "localhost"),
            ("file://localhost", "localhost"),
            ("https://localhost:80", "localhost"),
        ] {
            assert!(!is_own(origin, host), "{origin} {host}");
        }
        let origins = ["http://localhost:3000".to_owned()];
        assert!(allows(&origins, "http://LOCALHOST:3000"));
        assert!(!allows(&origins, "http://localhost:3001") && !allows(&[], "null"));
        assert!(allows(&["*".to_owned()], "null"));
    }
}
