//! The way out: how a text that has been begun can come to an accepted end.
//!
//! llguidance tells which bytes may follow, not how far an end is. So ends are searched
//! for, nearest first, over the states that what may follow leads to. Two texts are in
//! one state where the lexer is, and where a JSON text stands at the same place of its
//! structure ([`Position`]); of a pattern or a list of choices that is exact.
//!
//! Searching by bytes is cheap and finds an end of the fewest bytes; searching by tokens
//! walks the vocabulary in every state and finds one of the fewest tokens. Both are
//! bounded by work, not by time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use llguidance::derivre::StateID;
use llguidance::earley::{Parser, ParserRecognizer};
use llguidance::toktrie::{Recognizer, TokTrie, TrieNode};

use super::position::{Position, Structure};

/// What a search may cost, in bytes pushed.
const MAX_WORK: usize = 150_000;
/// The same for a search by tokens, of which a grammar needs one at most.
const MAX_WORK_BY_TOKENS: usize = 500_000;

/// What one step of a search is, and costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Each byte costs 1: this finds an end of the fewest bytes.
    Byte,
    /// Where JSON leaves much open there are too many states for that; then what is
    /// nested counts as far away.
    ShallowByte,
    /// Each token costs 1.
    Token,
}

/// By [`Step::ShallowByte`], the cost of a level.
const COST_OF_LEVEL: usize = 256;

/// The tokens of a short accepted end of the text that `parser` has seen; none at all
/// where the text may end there. `position` is where a JSON text stands.
pub(super) fn closing(
    parser: &mut Parser,
    trie: &TokTrie,
    position: Option<&Position>,
    kind: Step,
) -> Option<Vec<u32>> {
    if parser.is_accepting() {
        return Some(Vec::new());
    }
    let mut search = Search::new(trie, position.cloned(), kind);
    match kind {
        Step::Token => search.run(parser, MAX_WORK_BY_TOKENS),
        Step::Byte | Step::ShallowByte => {
            let steps = search.run(parser, MAX_WORK)?;
            let bytes: Vec<u8> = steps.iter().map(|&byte| byte as u8).collect();
            fewest_tokens(trie, &bytes)
        }
    }
}

/// The state of the lexer after `bytes`, which `parser` allows.
pub(super) fn lexer_state(parser: &mut Parser, bytes: &[u8]) -> Option<StateID> {
    after(parser, bytes, |recognizer| recognizer.lexer_state())
}

/// Whether `parser` allows `bytes`, and a text that has closed what it opened may end there.
pub(super) fn may_end_after(parser: &mut Parser, bytes: &[u8]) -> bool {
    let may_end = |recognizer: &mut ParserRecognizer| {
        let state = recognizer.lexer_state();
        !recognizer.lexer_mut().try_lexeme_end(state).is_error() || !any_allowed(recognizer)
    };
    after(parser, bytes, may_end) == Some(true)
}

/// What `look` sees after `bytes`, if `parser` allows them.
fn after<T>(
    parser: &mut Parser,
    bytes: &[u8],
    look: impl FnOnce(&mut ParserRecognizer) -> T,
) -> Option<T> {
    parser.with_recognizer(|recognizer| {
        recognizer.trie_started("after");
        let allowed = bytes.iter().all(|&byte| recognizer.try_push_byte(byte));
        let seen = allowed.then(|| look(recognizer));
        recognizer.trie_finished();
        seen
    })
}

/// The fewest tokens that spell `bytes`, of them the ones with the longest beginnings.
fn fewest_tokens(trie: &TokTrie, bytes: &[u8]) -> Option<Vec<u32>> {
    // By place: how many tokens from there to the end, and the first of them.
    let mut best: Vec<Option<(usize, u32)>> = vec![Some((0, 0)); bytes.len() + 1];
    for start in (0..bytes.len()).rev() {
        let mut node = Some(trie.root());
        let mut found = None;
        for end in start..bytes.len() {
            node = node.and_then(|node| trie.child_at_byte(node, bytes[end]));
            let Some(node) = node else { break };
            if let (Some(token), Some((count, _))) = (node.token_id(), best[end + 1])
                && found.is_none_or(|(fewest, _)| count < fewest)
            {
                found = Some((count + 1, token));
            }
        }
        best[start] = found;
    }
    let mut tokens = Vec::new();
    let mut place = 0;
    while place < bytes.len() {
        let (_, token) = best[place]?;
        tokens.push(token);
        place += trie.token_len(token);
    }
    Some(tokens)
}

/// Whether any byte may follow.
pub(super) fn can_go_on(parser: &mut Parser) -> bool {
    after(parser, &[], any_allowed) == Some(true)
}

fn any_allowed(recognizer: &mut ParserRecognizer) -> bool {
    (0..=u8::MAX).any(|byte| recognizer.byte_allowed(byte))
}

/// A text that may follow: its last step, after the text of another node.
struct Node {
    before: usize,
    /// The byte or token.
    step: u32,
    num_steps: usize,
    position: Option<Position>,
    /// The grammar may accept it.
    may_end: bool,
}

struct Search<'a> {
    trie: &'a TokTrie,
    kind: Step,
    /// Whether a byte is a token of its own: what else the vocabulary has is not looked at.
    is_token: [bool; 256],
    /// The first is the empty text.
    nodes: Vec<Node>,
    seen: HashSet<(StateID, Structure)>,
    /// By cost, and then by age.
    queue: BinaryHeap<Reverse<(usize, usize)>>,
    /// The node whose text the recognizer has been given.
    at: usize,
    work: usize,
}

impl<'a> Search<'a> {
    fn new(trie: &'a TokTrie, position: Option<Position>, kind: Step) -> Self {
        let root = Node { before: 0, step: 0, num_steps: 0, position, may_end: false };
        let queue = BinaryHeap::from([Reverse((0, 0))]);
        let mut is_token = [false; 256];
        let bytes = trie.node_children(trie.root());
        bytes.for_each(|byte| is_token[usize::from(byte.byte())] = byte.token_id().is_some());
        Self {
            trie,
            kind,
            is_token,
            nodes: vec![root],
            seen: HashSet::new(),
            queue,
            at: 0,
            work: 0,
        }
    }

    /// The steps to the nearest end.
    fn run(&mut self, parser: &mut Parser, max_work: usize) -> Option<Vec<u32>> {
        while let Some(end) = parser.with_recognizer(|r| self.next_end(r, max_work)) {
            let steps = self.steps_to(end);
            let text: Vec<u8> = steps.iter().flat_map(|step| self.word(step)).copied().collect();
            let mut ended = parser.clone();
            ended.apply_token(&text, 0).ok()?;
            if ended.is_accepting() {
                return Some(steps);
            }
        }
        None
    }

    /// Goes on until a node may be an end.
    fn next_end(&mut self, recognizer: &mut ParserRecognizer, max_work: usize) -> Option<usize> {
        recognizer.trie_started("closing");
        self.at = 0;
        let mut end = None;
        while end.is_none() && self.work < max_work {
            let Some(Reverse((cost, node))) = self.queue.pop() else { break };
            if std::mem::take(&mut self.nodes[node].may_end) {
                // It is looked at again if it is none.
                self.queue.push(Reverse((cost, node)));
                end = Some(node);
            } else {
                if !self.go_to(recognizer, node) {
                    break;
                }
                // What nothing can follow is an end.
                end = (!self.expand(recognizer)).then_some(node);
            }
        }
        recognizer.trie_finished();
        end
    }

    /// Brings the recognizer from the text of one node to that of another. False where it
    /// has come to a limit on its size.
    fn go_to(&mut self, recognizer: &mut ParserRecognizer, node: usize) -> bool {
        let (mut from, mut to) = (self.at, node);
        let mut steps = Vec::new();
        while from != to {
            let (left, right) = (&self.nodes[from], &self.nodes[to]);
            if left.num_steps >= right.num_steps {
                recognizer.pop_bytes(self.word(&left.step).len());
                from = left.before;
            } else {
                steps.push(right.step);
                to = right.before;
            }
        }
        for step in steps.iter().rev() {
            for &byte in self.word(step) {
                if !recognizer.try_push_byte(byte) {
                    return false;
                }
                self.work += 1;
            }
        }
        self.at = node;
        true
    }

    /// Adds what may follow the text that the recognizer is at. False if nothing may.
    fn expand(&mut self, recognizer: &mut ParserRecognizer) -> bool {
        match self.kind {
            Step::Byte | Step::ShallowByte => self.expand_by_bytes(recognizer),
            Step::Token => self.expand_by_tokens(recognizer, self.trie.root()),
        }
    }

    /// Adds the bytes that may follow. Most lead to the same few states.
    fn expand_by_bytes(&mut self, recognizer: &mut ParserRecognizer) -> bool {
        let mut any = false;
        let mut states = Vec::new();
        for byte in 0..=u8::MAX {
            if !recognizer.try_push_byte(byte) {
                continue;
            }
            any = true;
            self.work += 1;
            let state = recognizer.lexer_state();
            let position = &self.nodes[self.at].position;
            let is_plain = position.as_ref().is_none_or(|position| position.is_plain(byte));
            if self.is_token[usize::from(byte)] && !(is_plain && states.contains(&state)) {
                self.add(recognizer, byte.into());
                if is_plain {
                    states.push(state);
                }
            }
            recognizer.pop_bytes(1);
        }
        any
    }

    /// Adds the tokens below `node` of the vocabulary that may follow.
    fn expand_by_tokens(&mut self, recognizer: &mut ParserRecognizer, node: &'a TrieNode) -> bool {
        let mut any = false;
        for child in self.trie.node_children(node) {
            if recognizer.try_push_byte(child.byte()) {
                any = true;
                self.work += 1;
                if let Some(token) = child.token_id() {
                    self.add(recognizer, token);
                }
                self.expand_by_tokens(recognizer, child);
                recognizer.pop_bytes(1);
            }
        }
        any
    }

    /// Adds the text that the recognizer has been given, the current node's and `step`,
    /// if it leads to a new state.
    fn add(&mut self, recognizer: &mut ParserRecognizer, step: u32) {
        let before = &self.nodes[self.at];
        let num_steps = before.num_steps + 1;
        let position = match &before.position {
            None => None,
            Some(position) => match position.after(self.word(&step)) {
                None => return,
                after => after,
            },
        };
        let state = recognizer.lexer_state();
        let structure = position.as_ref().map(Position::structure).unwrap_or_default();
        let depth = position.as_ref().map_or(0, Position::depth);
        // What a node holds grows with its depth.
        self.work += depth / 8;
        if !self.seen.insert((state, structure)) {
            return;
        }
        let may_end = depth == 0 && !recognizer.lexer_mut().try_lexeme_end(state).is_error();
        let cost = match self.kind {
            Step::Byte | Step::Token => num_steps,
            Step::ShallowByte => num_steps + COST_OF_LEVEL * depth,
        };
        self.queue.push(Reverse((cost, self.nodes.len())));
        self.nodes.push(Node { before: self.at, step, num_steps, position, may_end });
    }

    fn steps_to(&self, node: usize) -> Vec<u32> {
        let nodes = std::iter::successors(Some(node), |&node| Some(self.nodes[node].before));
        let mut steps: Vec<u32> =
            nodes.take_while(|&node| node != 0).map(|node| self.nodes[node].step).collect();
        steps.reverse();
        steps
    }

    /// The bytes of a step.
    fn word(&self, step: &u32) -> &'a [u8] {
        match self.kind {
            Step::Byte | Step::ShallowByte => &BYTES[*step as usize],
            Step::Token => self.trie.token(*step),
        }
    }
}

/// Each byte as a text of its own.
static BYTES: [[u8; 1]; 256] = {
    let mut bytes = [[0]; 256];
    let mut byte = 0;
    while byte < 256 {
        bytes[byte] = [byte as u8];
        byte += 1;
    }
    bytes
};
