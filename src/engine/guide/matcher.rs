//! One text on its way through its grammar.

use std::collections::HashMap;
use std::convert::Infallible;

use llguidance::TokenParser;
use llguidance::toktrie::SimpleVob;

use llguidance::derivre::StateID;

use super::closing::{Step, can_go_on, closing, lexer_state, may_end_after};
use super::compile::{Facts, guarded};
use super::position::{Position, Structure};

/// Follows a grammar token by token, and watches the room that is left for new tokens.
///
/// With every token it looks for the way out of the text. A token after which no way out
/// would fit is not taken; the way out that was known before it is. So a text that could
/// have ended in time does.
pub struct Matcher {
    parser: TokenParser,
    facts: Facts,
    /// Where a JSON text stands.
    position: Option<Position>,
    /// The way out of the text as it is, if one is known that fits.
    way_out: Option<Vec<u32>>,
    /// The ways out that have been known, by what they depend on: a text comes to the
    /// same state again and again, within a string at every token.
    known: HashMap<State, Vec<u32>>,
    /// The newest token that was looked at, and the way out after it.
    looked_at: Option<(u32, Option<Vec<u32>>)>,
    /// Tokens to take without a look, since none was of use.
    unwatched: usize,
    has_begun: bool,
    complete: bool,
}

type State = (StateID, Structure);

impl Matcher {
    /// Ways out that are kept.
    const MAX_KNOWN: usize = 64;

    pub(super) fn new(parser: TokenParser, facts: Facts) -> Self {
        let position = facts.is_json.then(Position::default);
        Self {
            parser,
            facts,
            position,
            way_out: None,
            known: HashMap::new(),
            looked_at: None,
            unwatched: 0,
            has_begun: false,
            complete: false,
        }
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

    /// Whether room may be short. Then a token is to be asked about ([`Self::fits`])
    /// before it is taken.
    pub fn is_tight(&self, room: usize) -> bool {
        let way_out = self.way_out.as_ref().map_or(self.facts.shortest.len(), Vec::len);
        room <= way_out + self.facts.growth()
    }

    /// Whether a text can end in time after `token`, one of the allowed; true for all
    /// tokens where no way out is known. `room` is as in [`Self::take`].
    pub fn fits(&mut self, token: u32, room: usize) -> bool {
        if self.unwatched > 0 || self.facts.eos_token_ids.contains(&token) {
            return true;
        }
        let looked = guarded(|| {
            self.find_way_out(room);
            Ok::<_, Infallible>(
                self.way_out.is_none() || self.look_at(token, room.saturating_sub(1)).is_some(),
            )
        });
        looked.unwrap_or(true)
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
        self.has_begun = true;
        self.looked_at = None;
        if self.facts.eos_token_ids.contains(&token) {
            self.complete = true;
            return Ok(token);
        }
        let word = self.parser.token_env.tok_trie().token(token);
        self.position = self.position.take().map(|place| place.after(word).unwrap_or_default());
        let parser = &mut self.parser;
        let taken = guarded(|| {
            parser
                .consume_token(token)
                .map(|_| parser.is_accepting() && !can_go_on(&mut parser.parser))
        });
        self.complete = taken?;
        self.remember();
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
        self.facts.shortest.len()
    }

    /// Takes away the tokens that would make a number longer than readers take, unless
    /// the grammar wants one.
    fn shorten_numbers(&self, allowed: &mut SimpleVob) {
        let Some(position) = &self.position else { return };
        let trie = self.parser.token_env.tok_trie();
        let too_long = |id: &u32| !position.allows(trie.token(*id));
        without(allowed, self.facts.numeric.iter().copied().filter(too_long));
    }

    /// Looks for the way out after `token`. Gives the token to take.
    fn watch(&mut self, token: u32, room: usize) -> u32 {
        self.find_way_out(room);
        let after = room.saturating_sub(1);
        let way_out = self.look_at(token, after);
        let (token, way_out) = match (way_out, self.way_out.as_deref()) {
            (Some(way_out), _) => (token, Some(way_out)),
            (None, Some([first, rest @ ..])) => (*first, Some(rest.to_vec())),
            // It may end right here, and after this token no more.
            (None, Some([])) => match self.facts.eos_token_ids.first() {
                Some(&eos) => (eos, None),
                None => (token, None),
            },
            // Too late, or none is found; it may be nearer in a while.
            (None, None) => {
                self.unwatched = self.facts.growth();
                (token, None)
            }
        };
        self.way_out = way_out;
        token
    }

    /// Makes sure that the way out of the text as it is is known, if there is one that
    /// fits.
    fn find_way_out(&mut self, room: usize) {
        if self.way_out.is_some() {
            return;
        }
        let way_out = match self.has_begun {
            true => self.closing(&[], room),
            false => self.facts.way_in(room, || self.search(&[], Step::Token)),
        };
        self.way_out = way_out.filter(|way_out| way_out.len() <= room);
    }

    /// The way out after `token`, of `max_tokens` at most.
    fn look_at(&mut self, token: u32, max_tokens: usize) -> Option<Vec<u32>> {
        if let Some([first, rest @ ..]) = self.way_out.as_deref()
            && *first == token
        {
            return Some(rest.to_vec());
        }
        let way_out = match self.looked_at.take() {
            Some((looked_at, way_out)) if looked_at == token => way_out,
            _ => {
                let word = self.parser.token_env.tok_trie().token(token).to_vec();
                self.closing(&word, max_tokens)
            }
        };
        self.looked_at = Some((token, way_out.clone()));
        way_out
    }

    /// A way out of `max_tokens` at most after the bytes `next`, which the grammar allows:
    /// one that is known, or a short one.
    fn closing(&mut self, next: &[u8], max_tokens: usize) -> Option<Vec<u32>> {
        let state = self.state_after(next)?;
        for known in [self.known.get(&state).cloned(), self.way_out.clone()].into_iter().flatten() {
            if known.len() <= max_tokens && self.is_way_out(next, &known) {
                return Some(known);
            }
        }
        let mut found = self.search(next, self.facts.step);
        if found.is_none() && self.facts.step == Step::Byte {
            found = self.search(next, Step::ShallowByte);
        }
        found.filter(|way_out| way_out.len() <= max_tokens)
    }

    fn search(&self, next: &[u8], step: Step) -> Option<Vec<u32>> {
        // A deep clone: what is looked at and not taken leaves no trace in the text's
        // own parser, so that a replayed text goes on as the first would.
        let mut parser = self.parser.parser.deep_clone();
        parser.apply_token(next, 0).ok()?;
        let position = self.position_after(next);
        closing(&mut parser, self.parser.token_env.tok_trie(), position.as_ref(), step)
    }

    /// Whether `tokens` lead to an end after `next`.
    fn is_way_out(&mut self, next: &[u8], tokens: &[u32]) -> bool {
        let way_out = self.parser.token_env.tok_trie().decode_raw(tokens);
        let text = [next, &way_out].concat();
        self.position_after(&text).is_none_or(|position| position.depth() == 0)
            && may_end_after(&mut self.parser.parser, &text)
    }

    fn state_after(&mut self, next: &[u8]) -> Option<State> {
        let structure = self.position_after(next).map(|position| position.structure());
        let lexer = lexer_state(&mut self.parser.parser, next)?;
        Some((lexer, structure.unwrap_or_default()))
    }

    fn position_after(&self, next: &[u8]) -> Option<Position> {
        self.position.as_ref().map(|position| position.after(next).unwrap_or_default())
    }

    /// Keeps the way out that was found for the text as it is.
    fn remember(&mut self) {
        let Some(way_out) = self.way_out.clone() else { return };
        let Some(state) = self.state_after(&[]) else { return };
        if self.known.len() >= Self::MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(state, way_out);
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
    /// Tokens by which a way out grows at most with one token of the text, but for
    /// optional parts that ask for more than the whole: a token may open all that the
    /// grammar asks for.
    fn growth(&self) -> usize {
        self.shortest.len() + 32
    }

    /// The tokens of a whole text that fits into `room`: the one that is known, or one
    /// of the fewest tokens, which `search` finds.
    fn way_in(&self, room: usize, search: impl FnOnce() -> Option<Vec<u32>>) -> Option<Vec<u32>> {
        let shortest = self.shortest.to_vec();
        if !shortest.is_empty() && shortest.len() <= room {
            return Some(shortest);
        }
        self.fewest.get_or_init(search).clone()
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").field("complete", &self.complete).finish_non_exhaustive()
    }
}
