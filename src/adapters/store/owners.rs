//! Owners of names in the catalogue, and the room on the disk that they share.
//!
//! Owns that table's statements. Never knows who may do what. The thing to know: a row without a
//! tenant is from before names had owners; an empty tenant is the operator, whose rows stay when a
//! name is deleted.

use super::Store;
use super::rows::{own, text};
use crate::error::{Error, Result};
use sqlx::Row as _;

impl Store {
    /// Whose a name is, or was when it was deleted; empty: the operator's.
    pub async fn owner(&self, name: &str) -> Result<Option<String>> {
        let query = sqlx::query("SELECT tenant FROM owners WHERE name = ?").bind(name);
        let row = self.catalogue.row(query).await?;
        Ok(row.map_or(Ok(None), |row| row.try_get("tenant"))?)
    }

    /// Names whose owner is not known yet.
    pub async fn ownerless(&self) -> Result<Vec<String>> {
        let query = sqlx::query("SELECT name FROM owners WHERE tenant IS NULL ORDER BY name");
        self.catalogue.rows(query).await?.iter().map(|row| text(row, "name")).collect()
    }

    /// Writes down the owners of names, as (name, tenant).
    pub async fn set_owners(&self, owners: &[(String, String)]) -> Result<()> {
        let mut t = self.begin().await?;
        for (name, tenant) in owners {
            own(name, tenant, &mut t).await?;
        }
        t.commit().await
    }

    pub(super) async fn owners(&self) -> Result<Vec<(String, String)>> {
        let query = sqlx::query("SELECT name, tenant FROM owners WHERE tenant IS NOT NULL");
        let rows = self.catalogue.rows(query).await?;
        rows.iter().map(|row| Ok((text(row, "name")?, text(row, "tenant")?))).collect()
    }

    /// (free, all) bytes of the file system that adapters are on.
    pub fn space(&self) -> Result<(u64, u64)> {
        // On a disk that took nothing at the start, the directory itself is not made yet.
        let there = self.blobs.ancestors().find(|dir| dir.exists()).unwrap_or(&self.blobs);
        let stat = rustix::fs::statvfs(there)
            .map_err(|e| Error::fault(format!("cannot tell how full the disk is: {e}")))?;
        Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
    }
}
