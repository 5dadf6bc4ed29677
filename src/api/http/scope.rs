//! Whom a route is for, as the table of routes says it of each request.
//!
//! Owns the words. Never decides: `auth` and `browsers` do. The thing to know: the table puts a
//! [`Matched`] among a request's extensions before any other layer looks at it.

use axum::extract::Request;

/// Who a route is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Open even where keys are needed: liveness, no names, no text.
    Public,
    /// Whoever has a key: what is the same for all.
    AnyKey,
    Inference,
    /// Changes or lists adapters; a tenant's key its own.
    Admin,
    /// The same scope of a key without a tenant: keys themselves.
    Operator,
    /// A key without a tenant: the figures are the whole server's.
    Metrics,
}

/// The row of the table that a request matched.
#[derive(Debug, Clone, Default)]
pub struct Matched {
    /// None: no route has this path, or none of its routes this method.
    pub scope: Option<Scope>,
    /// Whether the route takes files rather than JSON.
    pub upload: bool,
    /// The methods of the path, for a request that asks by OPTIONS.
    pub methods: Option<String>,
}

impl Matched {
    /// What the table said of `request`.
    pub fn of(request: &Request) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or_default()
    }
}
