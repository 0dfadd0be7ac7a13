//! One text on its way through its grammar.

use std::convert::Infallible;

use llguidance::TokenParser;
use llguidance::toktrie::SimpleVob;

use super::closing::{can_go_on, closing};
use super::compile::{Facts, guarded};
use super::numbers::Place;

/// Follows a grammar token by token, and watches the room that is left for new tokens.
///
/// From time to time, and towards the end of the room at every token, it looks for the
/// way out of the text. A token after which no way out would fit is not taken; the way
/// out that was known before it is. So a text that could have ended in time does.
pub struct Matcher {
    parser: TokenParser,
    facts: Facts,
    /// In JSON: where the text's numbers are.
    place: Place,
    /// The way out of the text as it is, where the newest token was looked at.
    way_out: Option<Vec<u32>>,
    /// Tokens to take without a look.
    unwatched: usize,
    complete: bool,
}

impl Matcher {
    pub(super) fn new(parser: TokenParser, facts: Facts) -> Self {
        let place = Place::default();
        Self { parser, facts, place, way_out: None, unwatched: 0, complete: false }
    }

    /// The tokens that may come next, as a bitmap by id. Where the text may end there,
    /// the EOS tokens are among them; with `ignore_eos` only if there are no others.
    ///
    /// # Errors
    /// No token can follow, or a limit on the grammar's size is exceeded.
    pub fn allowed(&mut self, ignore_eos: bool) -> Result<SimpleVob, String> {
        let mut allowed = guarded(|| self.parser.compute_mask())
            .map_err(|reason| format!("the text cannot go on as its guide asks: {reason}"))?;
        self.shorten_numbers(&mut allowed);
        if ignore_eos {
            without(&mut allowed, self.facts.eos_token_ids.iter().copied());
        }
        Ok(allowed)
    }

    /// Takes `token`, one of the allowed; or in its place, where there would be no way
    /// out in time, the way out's next token. Gives the token that was taken.
    /// `room` is how many tokens the text may still get, this one included.
    ///
    /// # Errors
    /// The grammar refuses the token, or a limit on its size is exceeded.
    pub fn take(&mut self, token: u32, room: usize) -> Result<u32, String> {
        let token = match self.unwatched {
            0 => guarded(|| Ok::<_, Infallible>(self.watch(token, room)))?,
            _ => {
                self.unwatched -= 1;
                self.way_out = None;
                token
            }
        };
        if self.facts.eos_token_ids.contains(&token) {
            self.complete = true;
            return Ok(token);
        }
        let word = self.parser.token_env.tok_trie().token(token);
        self.place = self.place.after(word).unwrap_or_default();
        let parser = &mut self.parser;
        let taken = guarded(|| {
            parser.consume_token(token).map(|_| parser.is_accepting() && !can_go_on(parser))
        });
        self.complete = taken?;
        Ok(token)
    }

    /// Takes a token that a matcher of the same grammar has taken at this place, with
    /// the same `room`. False where it cannot have.
    pub fn replay(&mut self, token: u32, room: usize) -> bool {
        // The mask is made again too, so that the caches are those of an unbroken run.
        let allowed = self.allowed(false);
        allowed.is_ok_and(|allowed| allowed.is_allowed(token))
            && self.take(token, room) == Ok(token)
    }

    /// Whether the text has ended: nothing may follow.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether the text may end here.
    pub fn is_accepting(&mut self) -> bool {
        self.complete
            || guarded(|| Ok::<_, Infallible>(self.parser.is_accepting())).unwrap_or(false)
    }

    /// Tokens of a short whole text, as far as one was found.
    #[cfg(test)]
    pub(super) fn shortest(&self) -> usize {
        self.facts.shortest
    }

    /// Takes away the tokens that would make a number longer than readers take, unless
    /// the grammar wants one.
    fn shorten_numbers(&self, allowed: &mut SimpleVob) {
        let trie = self.parser.token_env.tok_trie();
        let too_long = |id: &u32| self.place.after(trie.token(*id)).is_none();
        without(allowed, self.facts.numeric.iter().copied().filter(too_long));
    }

    /// Looks for the way out after `token`. Gives the token to take.
    fn watch(&mut self, token: u32, room: usize) -> u32 {
        if self.way_out.is_none() {
            self.way_out = self.closing(None, room);
        }
        let after = room.saturating_sub(1);
        if let Some(way_out) = self.closing(Some(token), after) {
            return self.go_on(token, way_out, after);
        }
        let known = match &self.way_out {
            None => {
                // Too late, or none is found; it may be nearer in a while.
                self.unwatched = self.facts.growth();
                return token;
            }
            Some(known) => known.clone(),
        };
        let Some((&first, rest)) = known.split_first() else {
            // It may end right here, and after this token no more.
            return self.facts.eos_token_ids.first().copied().unwrap_or(token);
        };
        let way_out = self.closing(Some(first), after).unwrap_or_else(|| rest.to_vec());
        self.go_on(first, way_out, after)
    }

    /// Takes `token`, after which `way_out` is known, and plans the next look: as long
    /// as there is plenty of room, only after some tokens.
    fn go_on(&mut self, token: u32, way_out: Vec<u32>, room: usize) -> u32 {
        self.unwatched = (room - way_out.len().min(room)) / self.facts.growth();
        self.way_out = Some(way_out);
        token
    }

    fn closing(&self, next: Option<u32>, max_tokens: usize) -> Option<Vec<u32>> {
        let trie = self.parser.token_env.tok_trie();
        let next = next.map_or(&[][..], |token| trie.token(token));
        let place = self.facts.is_json.then_some(self.place);
        closing(&self.parser.parser, trie, place, next, max_tokens)
    }
}

/// Takes `ids` away from `allowed`, if anything is left then.
fn without(allowed: &mut SimpleVob, ids: impl Iterator<Item = u32>) {
    let mut rest = allowed.clone();
    ids.for_each(|id| rest.disallow_token(id));
    if !rest.is_zero() {
        *allowed = rest;
    }
}

impl Facts {
    /// Tokens by which a way out is taken to grow at most with one token of the text:
    /// a token may open all that the grammar asks for.
    fn growth(&self) -> usize {
        self.shortest + 32
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").field("complete", &self.complete).finish_non_exhaustive()
    }
}
