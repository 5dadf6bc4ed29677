//! Owners of names in the catalogue, and the room on the disk that they share.
//!
//! Owns that table's statements. Never knows who may do what. The thing to know: a row without a
//! tenant is from before names had owners; an empty tenant is the operator, whose rows stay when a
//! name is deleted.

use super::{Store, catalogue_error};
use crate::error::{Error, Result};

impl Store {
    /// Whose a name is, or was when it was deleted; empty: the operator's.
    pub async fn owner(&self, name: &str) -> Result<Option<String>> {
        let owner: Option<Option<String>> =
            sqlx::query_scalar("SELECT tenant FROM owners WHERE name = ?")
                .bind(name)
                .fetch_optional(&self.catalogue)
                .await
                .map_err(catalogue_error)?;
        Ok(owner.flatten())
    }

    /// Names whose owner is not known yet.
    pub async fn ownerless(&self) -> Result<Vec<String>> {
        sqlx::query_scalar("SELECT name FROM owners WHERE tenant IS NULL ORDER BY name")
            .fetch_all(&self.catalogue)
            .await
            .map_err(catalogue_error)
    }

    /// Writes down the owners of names, as (name, tenant).
    pub async fn set_owners(&self, owners: &[(String, String)]) -> Result<()> {
        let mut t = self.catalogue.begin().await.map_err(catalogue_error)?;
        for (name, tenant) in owners {
            own(name, tenant, &mut t).await?;
        }
        t.commit().await.map_err(catalogue_error)
    }

    pub(super) async fn owners(&self) -> Result<Vec<(String, String)>> {
        sqlx::query_as("SELECT name, tenant FROM owners WHERE tenant IS NOT NULL")
            .fetch_all(&self.catalogue)
            .await
            .map_err(catalogue_error)
    }

    /// (free, all) bytes of the file system that adapters are on.
    pub fn space(&self) -> Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(&self.blobs)
            .map_err(|e| Error::fault(format!("cannot tell how full the disk is: {e}")))?;
        Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
    }
}

/// Within a change of the name.
pub(super) async fn own(name: &str, tenant: &str, t: &mut sqlx::SqliteConnection) -> Result<()> {
    sqlx::query("INSERT OR REPLACE INTO owners (name, tenant) VALUES (?, ?)")
        .bind(name)
        .bind(tenant)
        .execute(t)
        .await
        .map_err(catalogue_error)
        .map(drop)
}

/// A tenant's name is given up, the operator's is kept.
pub(super) async fn disown(name: &str, t: &mut sqlx::SqliteConnection) -> Result<()> {
    sqlx::query("DELETE FROM owners WHERE name = ? AND tenant <> ''")
        .bind(name)
        .execute(t)
        .await
        .map_err(catalogue_error)
        .map(drop)
}
