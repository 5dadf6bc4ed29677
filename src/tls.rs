//! How clients in this program make HTTP requests: rustls with ring, which build quickly and without
//! cmake.
//!
//! The thing to know: a client of reqwest that is not made here panics, for want of a provider.

/// Lets every TLS connection of this process use ring.
pub fn install() {
    // Only the first call installs it; the others find it there.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The beginning of a client.
pub fn client() -> reqwest::ClientBuilder {
    install();
    reqwest::Client::builder()
}
