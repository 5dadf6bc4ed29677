//! `/v1/files` and `/v1/uploads`, as OpenAI's.

use crate::train::data::{Preview, Span};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One file.
#[derive(Serialize, ToSchema)]
pub struct FileShown {
    #[schema(example = "file-0f3c")]
    pub id: String,
    #[schema(example = "file")]
    pub object: &'static str,
    pub bytes: u64,
    /// Unix seconds
    pub created_at: u64,
    /// Unix seconds; null: it stays until it is deleted.
    pub expires_at: Option<u64>,
    /// As its uploader called it, without directories.
    pub filename: String,
    /// `fine-tune`, or `fine-tune-results` of what a job made.
    pub purpose: &'static str,
    /// `processed`, or `error` where nothing can be learned from it.
    pub status: &'static str,
    /// Of an `error`: the line and what is wrong with it.
    pub status_details: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct FileList {
    #[schema(example = "list")]
    pub object: &'static str,
    pub data: Vec<FileShown>,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
    pub has_more: bool,
}

#[derive(Serialize, ToSchema)]
pub struct FileDeleted {
    pub id: String,
    #[schema(example = "file")]
    pub object: &'static str,
    /// False of a dry run.
    pub deleted: bool,
    /// What went with it, or would go, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cascade: Option<CascadeShown>,
}

/// What rests on a file.
#[derive(Serialize, ToSchema)]
pub struct CascadeShown {
    /// `name@version` of what learnt from it, and of what was made of that.
    pub versions: Vec<String>,
    /// Jobs that learnt from it, and merges of what they made.
    pub jobs: Vec<String>,
    /// Tables of these jobs' steps.
    pub files: Vec<String>,
    /// Names that mean a version that goes.
    pub names: Vec<CascadeName>,
    /// What your key may not know of.
    pub others: CascadeOthers,
    /// Of a dry run: why it would be refused now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_by: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct CascadeName {
    pub name: String,
    /// What it means then; null: nothing.
    pub version: Option<u64>,
}

#[derive(Serialize, ToSchema)]
pub struct CascadeOthers {
    pub versions: usize,
    pub jobs: usize,
}

/// Examples of a file.
#[derive(Serialize, ToSchema)]
pub struct PreviewList {
    #[schema(example = "list")]
    pub object: &'static str,
    pub data: Vec<PreviewShown>,
}

/// One example as it would be learnt.
#[derive(Serialize, ToSchema)]
pub struct PreviewShown {
    /// In the file, from 1.
    pub line: u64,
    pub tokens: usize,
    /// Tokens that are learnt.
    pub supervised_tokens: usize,
    /// The end was cut off at the context.
    pub truncated: bool,
    /// The whole text, piece by piece.
    pub spans: Vec<SpanShown>,
}

#[derive(Serialize, ToSchema)]
pub struct SpanShown {
    pub text: String,
    pub supervised: bool,
}

impl From<Preview> for PreviewShown {
    fn from(preview: Preview) -> Self {
        let Preview { line, tokens, supervised, cut, spans } = preview;
        let span = |span: Span| SpanShown { text: span.text, supervised: span.supervised };
        let spans = spans.into_iter().map(span).collect();
        Self { line, tokens, supervised_tokens: supervised, truncated: cut, spans }
    }
}

/// An upload in parts as it is to be.
#[derive(Deserialize, ToSchema)]
pub struct UploadFields {
    /// Of the whole file.
    pub bytes: u64,
    pub filename: String,
    /// For people only.
    #[schema(example = "text/jsonl")]
    pub mime_type: String,
    #[schema(example = "fine-tune")]
    pub purpose: String,
    pub expires_after: Option<ExpiresAfter>,
}

/// When a file is deleted by itself.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExpiresAfter {
    #[schema(example = "created_at")]
    pub anchor: String,
    /// 3600 to 2592000
    pub seconds: u64,
}

/// One upload in parts.
#[derive(Serialize, ToSchema)]
pub struct UploadShown {
    #[schema(example = "upload_0f3c")]
    pub id: String,
    #[schema(example = "upload")]
    pub object: &'static str,
    pub bytes: u64,
    /// Unix seconds
    pub created_at: u64,
    /// Unix seconds; it is forgotten then.
    pub expires_at: u64,
    pub filename: String,
    pub purpose: &'static str,
    /// `pending`, `completed` or `cancelled`
    pub status: &'static str,
    /// What it became.
    pub file: Option<FileShown>,
}

#[derive(Serialize, ToSchema)]
pub struct PartShown {
    #[schema(example = "part_0f3c")]
    pub id: String,
    #[schema(example = "upload.part")]
    pub object: &'static str,
    /// Unix seconds
    pub created_at: u64,
    pub upload_id: String,
}

/// Which parts an upload consists of.
#[derive(Deserialize, ToSchema)]
pub struct CompleteFields {
    /// In their order in the file.
    pub part_ids: Vec<String>,
    /// MD5 of the file, in hex digits; refused if it is not so.
    pub md5: Option<String>,
}
