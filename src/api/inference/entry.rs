//! Where inference begins: a request counts against its key before its body is read.
//!
//! Owns nothing. Never judges anything but the key's limits. The thing to know: it stands before
//! the body among a handler's arguments, and these are read in order.

use crate::access::{Caller, Ticket};
use crate::api::Api;
use crate::clock::Now;
use crate::error::Error;
use axum::extract::FromRequestParts;
use http::request::Parts;
use std::sync::Arc;

/// A request that may come in. Errors: `rate_limit_exceeded`.
pub struct Entry(pub Ticket);

impl FromRequestParts<Arc<Api>> for Entry {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Error> {
        let caller = parts.extensions.get::<Caller>().cloned();
        let caller = caller.unwrap_or_else(Caller::anonymous);
        api.access.enter(&caller, Now::read()).map(Self)
    }
}
