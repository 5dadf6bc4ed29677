//! Lines to examples, and to what a person reads of them.
//!
//! Owns the order of the work: render, encode, count. Never decides what is learnt: `borders` does.

use super::borders::{Ends, Form, Piece, Rendering, Template};
use super::digests::{self, Digest};
use super::encode::{Encoded, Encoder};
use super::examples::Examples;
use super::form::{Kind, Record, wrong};
use super::preview::Preview;
use super::problems::Stop;
use super::walk::{Limits, walk};
use crate::error::Result;
use crate::text::Text;
use crate::text::sandbox::{Sandbox, TemplateSource};
use std::io::BufRead;
use std::time::SystemTime;

/// How a file is read.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    pub text: &'a Text,
    /// The template of the version that is trained further, if it brought one: untrusted.
    pub own: Option<(&'a Sandbox, &'a TemplateSource)>,
    /// What the file must be. None: what its first line is.
    pub kind: Option<Kind>,
    /// Ids that an example may have.
    pub context: usize,
    /// Longer examples are cut at the end, not refused.
    pub truncate: bool,
    /// Examples without a supervised token are dropped and counted, not refused.
    pub drop_unsupervised: bool,
    /// The time that a template is told.
    pub now: SystemTime,
    pub limits: Limits,
}

/// A file that was read.
#[derive(Debug)]
pub struct Dataset {
    pub kind: Kind,
    pub examples: Examples,
    pub counts: Counts,
    /// Of the different lines, sorted.
    pub digests: Vec<Digest>,
    /// Number and digest of every line, in their order.
    pub lines: Vec<(u64, Digest)>,
}

/// What reading met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines that are not blank.
    pub lines: u64,
    /// Lines equal to an earlier one.
    pub duplicates: u64,
    /// Examples, or pairs of them, dropped because nothing in them is supervised.
    pub dropped: u64,
    /// Examples cut at the context.
    pub cut: u64,
    /// Chats that became one example for each answer.
    pub split: u64,
}

impl Reading<'_> {
    /// Reads a file to its end. `None`: `over` said that nobody waits for it any more. Errors:
    /// `invalid_training_file` with the first problems by line.
    pub fn read(&self, from: impl BufRead, over: &dyn Fn() -> bool) -> Result<Option<Dataset>> {
        let (encoder, ends) = self.parts()?;
        let (mut examples, mut counts) = (Examples::default(), Counts::default());
        let mut all = Vec::new();
        let walked = walk(from, self.kind, self.limits, over, |line, text, record| {
            all.push((line, digests::digest(text)));
            let drafts = self.drafts(&record, &ends, over)?;
            let encoded = encode_all(&encoder, &drafts)?;
            match learnable(&record, &encoded) {
                Err(why) if !self.drop_unsupervised => return Err(wrong(why).into()),
                Err(_) if matches!(record, Record::Pair(_)) => {
                    counts.dropped += 1;
                    return Ok(true);
                }
                Err(_) if encoded.is_empty() => counts.dropped += 1,
                _ => {}
            }
            let tokens: usize = encoded.iter().map(|example| example.ids.len()).sum();
            if examples.tokens() + tokens as u64 > self.limits.tokens {
                let most = self.limits.tokens;
                return Err(Stop::Last(wrong(format!("the file has more than {most} tokens"))));
            }
            counts.split += u64::from(matches!(record, Record::Chat(_)) && encoded.len() > 1);
            for example in &encoded {
                if example.supervised() == 0 {
                    counts.dropped += 1;
                    continue;
                }
                counts.cut += u64::from(example.cut);
                examples.push(line, example);
            }
            Ok(true)
        })?;
        let Some((kind, lines)) = walked else { return Ok(None) };
        if examples.is_empty() {
            return Err(wrong("all lines were dropped: none has a token that is learnt"));
        }
        let mut digests = all.iter().map(|(_, digest)| *digest).collect();
        (counts.lines, counts.duplicates) = (lines, digests::distinct(&mut digests));
        Ok(Some(Dataset { kind, examples, counts, digests, lines: all }))
    }

    /// The first `most` examples as text. Reads no further, so it tells problems of the lines
    /// before only. `None` and errors as of [`read`](Self::read).
    pub fn preview(
        &self,
        from: impl BufRead,
        most: usize,
        over: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<Preview>>> {
        let (encoder, ends) = self.parts()?;
        let mut shown = Vec::new();
        let walked = walk(from, self.kind, self.limits, over, |line, _, record| {
            let drafts = self.drafts(&record, &ends, over)?;
            let encoded = encode_all(&encoder, &drafts)?;
            if let Err(why) = learnable(&record, &encoded) {
                match self.drop_unsupervised {
                    true if matches!(record, Record::Pair(_)) => return Ok(true),
                    true => {}
                    false => return Err(wrong(why).into()),
                }
            }
            let examples = drafts.iter().zip(&encoded).filter(|(_, e)| e.supervised() > 0);
            for (pieces, encoded) in examples.take(most - shown.len()) {
                shown.push(Preview::new(self.text, line, pieces, encoded)?);
            }
            Ok(shown.len() < most)
        })?;
        Ok(walked.map(|_| shown))
    }

    fn parts(&self) -> Result<(Encoder<'_>, Ends)> {
        Ok((Encoder::new(self.text, self.context, self.truncate)?, Ends::of(self.text)))
    }

    /// Bytes of text that a template may write.
    fn text_bytes_max(&self) -> usize {
        match self.truncate {
            true => usize::MAX,
            false => (self.context + 64).saturating_mul(self.text.token_bytes_max()),
        }
    }

    /// The examples of a line in pieces: of a preference two.
    fn drafts(
        &self,
        record: &Record,
        ends: &Ends,
        over: &dyn Fn() -> bool,
    ) -> Result<Vec<Vec<Piece>>, Stop> {
        let Self { text, own, now, .. } = *self;
        let template = Template { text, own, now, bytes_max: self.text_bytes_max() };
        let rendering = |tools| Rendering { template, ends, tools, over };
        match record {
            Record::Chat(chat) => rendering(chat.tools.as_ref()).chat(chat),
            Record::Pair(pair) => Ok(rendering(pair.tools.as_ref()).pair(pair)?.into()),
            Record::Completion { prompt, completion } => {
                Ok(vec![self.completion(prompt, completion)?])
            }
        }
    }

    /// A prompt as `/v1/completions` encodes it, then the completion and the end of a text.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Vec<Piece>> {
        let end = self.text.eos.first().copied();
        let end = end.and_then(|id| Some((id, self.text.tokenizer.id_to_token(id)?)));
        let Some((id, end)) = end else {
            return Err(wrong("the model has no token that ends a text; use `messages`"));
        };
        let completion = completion.strip_suffix(&end).unwrap_or(completion);
        let piece = |text: &str, supervised, form| Piece { text: text.into(), supervised, form };
        Ok(vec![
            piece(prompt, false, Form::Prompt),
            piece(completion, true, Form::Rendered),
            piece(&end, true, Form::Token(id)),
        ])
    }
}

fn encode_all(encoder: &Encoder, drafts: &[Vec<Piece>]) -> Result<Vec<Encoded>> {
    drafts.iter().map(|pieces| encoder.encode(pieces)).collect()
}

/// Whether something can be learnt from every example of a line.
fn learnable(record: &Record, encoded: &[Encoded]) -> Result<(), &'static str> {
    let empty = encoded.iter().any(|example| example.supervised() == 0);
    match record {
        _ if encoded.is_empty() => Err("every assistant message has `weight: 0`"),
        _ if empty => Err("cut to the context, no token of an answer is left"),
        Record::Pair(_) if encoded[0].ids == encoded[1].ids => {
            Err("both answers have the same tokens")
        }
        _ => Ok(()),
    }
}
