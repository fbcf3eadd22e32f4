//! The grammar of a small POSIX shell: lists, pipelines, `if`, `while`, `until`, `for`, functions, groups, redirections.
//!
//! Refused by name: background jobs and here-documents. A wasm module has no second process.

use std::rc::Rc;

#[derive(Debug, Clone)]
pub enum Part {
    Text(String),
    /// Of quotes: never split, and present even when empty.
    Quoted(String),
    /// The name, an operator with its word, and whether it stood in double quotes.
    Variable(String, Option<(String, Word)>, bool),
    Command(Rc<Node>, bool),
    Arithmetic(Word, bool),
}

pub type Word = Vec<Part>;

#[derive(Debug, Clone)]
pub struct Redirection {
    pub descriptor: u8,
    pub operator: String,
    pub target: Word,
}

#[derive(Debug)]
pub enum Node {
    Simple { assignments: Vec<(String, Word)>, words: Vec<Word>, redirections: Vec<Redirection> },
    Pipe(Vec<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
    Not(Box<Node>),
    List(Vec<Node>),
    If(Vec<(Node, Node)>, Option<Box<Node>>),
    /// Whether it is `until`, the condition, the body.
    While(bool, Box<Node>, Box<Node>),
    For(String, Vec<Word>, Box<Node>),
    Subshell(Box<Node>),
    Function(String, Rc<Node>),
    Redirected(Box<Node>, Vec<Redirection>),
}

pub struct Parser {
    text: Vec<char>,
    at: usize,
}

type Parsed<T> = Result<T, String>;

const ENDS: [&str; 8] = ["then", "do", "done", "fi", "elif", "else", "}", "esac"];

pub fn parse(text: &str) -> Parsed<Node> {
    let mut parser = Parser { text: text.chars().collect(), at: 0 };
    let list = parser.list()?;
    if parser.at < parser.text.len() {
        return Err(format!("syntax error at {:?}", parser.rest(12)));
    }
    Ok(list)
}

/// The inside of double quotes or of an arithmetic expansion, as a word.
fn parse_quoted(text: &str) -> Parsed<Word> {
    let mut parser = Parser { text: text.chars().collect(), at: 0 };
    let mut word = Word::new();
    parser.quoted(None, &mut word)?;
    Ok(word)
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn rest(&self, count: usize) -> String {
        self.text[self.at..].iter().take(count).collect()
    }

    fn looking_at(&self, text: &str) -> bool {
        self.rest(text.chars().count()) == text
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.looking_at(text);
        if found {
            self.at += text.chars().count();
        }
        found
    }

    fn blanks(&mut self) {
        loop {
            match self.peek() {
                Some(' ') | Some('\t') | Some('\r') => self.at += 1,
                Some('\\') if self.looking_at("\\\n") => self.at += 2,
                Some('#') => {
                    while self.peek().map_or(false, |c| c != '\n') {
                        self.at += 1;
                    }
                }
                _ => return,
            }
        }
    }

    fn separators(&mut self) {
        loop {
            self.blanks();
            match self.peek() {
                Some('\n') | Some(';') => self.at += 1,
                _ => return,
            }
        }
    }

    /// The plain word that comes next, not taken.
    fn keyword(&self) -> String {
        self.text[self.at..].iter().take_while(|c| c.is_alphanumeric() || "_{}![]".contains(**c)).collect()
    }

    fn take_keyword(&mut self, word: &str) -> bool {
        self.separators();
        let found = self.keyword() == word;
        if found {
            self.at += word.len();
        }
        found
    }

    fn expect(&mut self, word: &str) -> Parsed<()> {
        if self.take_keyword(word) {
            return Ok(());
        }
        Err(format!("syntax error: {:?} expected at {:?}", word, self.rest(12)))
    }

    fn list(&mut self) -> Parsed<Node> {
        let mut nodes = Vec::new();
        loop {
            self.separators();
            if self.peek().map_or(true, |c| c == ')') || ENDS.contains(&self.keyword().as_str()) {
                return Ok(Node::List(nodes));
            }
            nodes.push(self.and_or()?);
            self.blanks();
            if self.peek() == Some('&') && !self.looking_at("&&") {
                return Err("a module cannot run a command in the background".to_string());
            }
            if self.peek().map_or(false, |c| !"\n;)".contains(c)) {
                return Err(format!("syntax error at {:?}", self.rest(12)));
            }
        }
    }

    fn and_or(&mut self) -> Parsed<Node> {
        let mut left = self.pipeline()?;
        loop {
            self.blanks();
            if self.take("&&") {
                self.separators();
                left = Node::And(Box::new(left), Box::new(self.pipeline()?));
            } else if self.take("||") {
                self.separators();
                left = Node::Or(Box::new(left), Box::new(self.pipeline()?));
            } else {
                return Ok(left);
            }
        }
    }

    fn pipeline(&mut self) -> Parsed<Node> {
        self.blanks();
        if self.keyword() == "!" {
            self.at += 1;
            return Ok(Node::Not(Box::new(self.pipeline()?)));
        }
        let mut nodes = vec![self.command()?];
        loop {
            self.blanks();
            if self.peek() != Some('|') || self.looking_at("||") {
                break;
            }
            self.at += 1;
            self.separators();
            nodes.push(self.command()?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Pipe(nodes) })
    }

    fn command(&mut self) -> Parsed<Node> {
        self.blanks();
        let node = if self.take("(") {
            let list = self.list()?;
            if !self.take(")") {
                return Err("syntax error: ')' is missing".to_string());
            }
            Node::Subshell(Box::new(list))
        } else {
            match self.keyword().as_str() {
                "{" => {
                    self.at += 1;
                    let list = self.list()?;
                    self.expect("}")?;
                    list
                }
                "if" => self.conditional()?,
                "while" | "until" => {
                    let until = self.keyword() == "until";
                    self.at += 5;
                    let condition = self.list()?;
                    Node::While(until, Box::new(condition), Box::new(self.body()?))
                }
                "for" => {
                    self.at += 3;
                    self.blanks();
                    let name = self.keyword();
                    self.at += name.len();
                    self.expect("in")?;
                    let mut words = Vec::new();
                    loop {
                        self.blanks();
                        match self.peek() {
                            Some('\n') | Some(';') | None => break,
                            _ => words.push(self.word()?),
                        }
                    }
                    Node::For(name, words, Box::new(self.body()?))
                }
                _ => return self.simple(),
            }
        };
        let mut redirections = Vec::new();
        while let Some(redirection) = self.redirection()? {
            redirections.push(redirection);
        }
        Ok(if redirections.is_empty() { node } else { Node::Redirected(Box::new(node), redirections) })
    }

    fn body(&mut self) -> Parsed<Node> {
        self.expect("do")?;
        let list = self.list()?;
        self.expect("done")?;
        Ok(list)
    }

    fn conditional(&mut self) -> Parsed<Node> {
        let mut branches = Vec::new();
        self.at += 2;
        loop {
            let condition = self.list()?;
            self.expect("then")?;
            branches.push((condition, self.list()?));
            if self.take_keyword("elif") {
                continue;
            }
            let otherwise = if self.take_keyword("else") { Some(Box::new(self.list()?)) } else { None };
            self.expect("fi")?;
            return Ok(Node::If(branches, otherwise));
        }
    }

    fn simple(&mut self) -> Parsed<Node> {
        let (mut assignments, mut words, mut redirections) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            if let Some(redirection) = self.redirection()? {
                redirections.push(redirection);
                continue;
            }
            match self.peek() {
                None | Some('\n') | Some(';') | Some('&') | Some('|') | Some(')') => break,
                Some('(') => {
                    if words.len() != 1 || !self.take("()") {
                        return Err(format!("syntax error at {:?}", self.rest(12)));
                    }
                    let name = plain(&words[0]).ok_or("a function has a plain name")?;
                    self.separators();
                    return Ok(Node::Function(name, Rc::new(self.command()?)));
                }
                _ => {}
            }
            let name: String = self.text[self.at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
            let assigns = !name.is_empty() && self.text.get(self.at + name.chars().count()) == Some(&'=');
            if words.is_empty() && assigns {
                self.at += name.chars().count() + 1;
                let ends = self.peek().map_or(true, |c| " \t\n;&|)".contains(c));
                assignments.push((name, if ends { Word::new() } else { self.word()? }));
            } else {
                words.push(self.word()?);
            }
        }
        if words.is_empty() && assignments.is_empty() && redirections.is_empty() {
            return Err(format!("syntax error at {:?}", self.rest(12)));
        }
        Ok(Node::Simple { assignments, words, redirections })
    }

    fn redirection(&mut self) -> Parsed<Option<Redirection>> {
        self.blanks();
        let start = self.at;
        let digit = self.peek().and_then(|c| c.to_digit(10));
        if digit.is_some() {
            self.at += 1;
        }
        for operator in [">>", ">&", "&>", "<<", ">", "<"] {
            if self.take(operator) {
                if operator == "<<" {
                    return Err("here-documents are not known here".to_string());
                }
                self.blanks();
                let descriptor = digit.unwrap_or(u32::from(operator != "<")) as u8;
                return Ok(Some(Redirection { descriptor, operator: operator.to_string(), target: self.word()? }));
            }
        }
        self.at = start;
        Ok(None)
    }

    fn word(&mut self) -> Parsed<Word> {
        let mut word = Word::new();
        let mut text = String::new();
        while let Some(c) = self.peek() {
            match c {
                ' ' | '\t' | '\r' | '\n' | ';' | '&' | '|' | '(' | ')' | '<' | '>' => break,
                '\\' => {
                    self.at += 1;
                    let escaped = self.peek().unwrap_or('\\');
                    self.at += 1;
                    flush(&mut word, &mut text);
                    if escaped != '\n' {
                        word.push(Part::Quoted(escaped.to_string()));
                    }
                }
                '\'' => {
                    flush(&mut word, &mut text);
                    self.at += 1;
                    let inside: String = self.text[self.at..].iter().take_while(|c| **c != '\'').collect();
                    self.at += inside.chars().count() + 1;
                    if self.at > self.text.len() {
                        return Err("syntax error: a quote is not closed".to_string());
                    }
                    word.push(Part::Quoted(inside));
                }
                '"' => {
                    flush(&mut word, &mut text);
                    self.at += 1;
                    word.push(Part::Quoted(String::new()));
                    self.quoted(Some('"'), &mut word)?;
                }
                '$' | '`' => {
                    flush(&mut word, &mut text);
                    word.push(self.expansion(false)?);
                }
                _ => {
                    text.push(c);
                    self.at += 1;
                }
            }
        }
        flush(&mut word, &mut text);
        if word.is_empty() {
            return Err(format!("syntax error at {:?}", self.rest(12)));
        }
        Ok(word)
    }

    fn quoted(&mut self, end: Option<char>, word: &mut Word) -> Parsed<()> {
        let mut text = String::new();
        loop {
            match self.peek() {
                None if end.is_none() => break,
                None => return Err("syntax error: a quote is not closed".to_string()),
                Some(c) if Some(c) == end => {
                    self.at += 1;
                    break;
                }
                Some('\\') if self.text.get(self.at + 1).map_or(false, |c| "$`\"\\".contains(*c)) => {
                    text.push(self.text[self.at + 1]);
                    self.at += 2;
                }
                Some('$') | Some('`') => {
                    word.push(Part::Quoted(std::mem::take(&mut text)));
                    word.push(self.expansion(true)?);
                }
                Some(c) => {
                    text.push(c);
                    self.at += 1;
                }
            }
        }
        if !text.is_empty() {
            word.push(Part::Quoted(text));
        }
        Ok(())
    }

    /// What begins with `$` or a backquote.
    fn expansion(&mut self, quoted: bool) -> Parsed<Part> {
        if self.take("`") {
            let inside: String = self.text[self.at..].iter().take_while(|c| **c != '`').collect();
            self.at += inside.chars().count() + 1;
            return Ok(Part::Command(Rc::new(parse(&inside)?), quoted));
        }
        if self.take("$((") {
            let inside = self.until_closed('(', ')')?;
            if !self.take(")") {
                return Err("syntax error in an arithmetic expansion".to_string());
            }
            return Ok(Part::Arithmetic(parse_quoted(&inside)?, quoted));
        }
        if self.take("$(") {
            let list = self.list()?;
            if !self.take(")") {
                return Err("syntax error: ')' is missing".to_string());
            }
            return Ok(Part::Command(Rc::new(list), quoted));
        }
        if self.take("${") {
            let inside = self.until_closed('{', '}')?;
            let name: String = inside.chars().take_while(|c| c.is_alphanumeric() || "_@?#".contains(*c)).collect();
            let rest: String = inside.chars().skip(name.chars().count()).collect();
            if rest.is_empty() {
                return Ok(Part::Variable(name, None, quoted));
            }
            let operator: String = rest.chars().take_while(|c| ":-?=+".contains(*c)).take(2).collect();
            let word: String = rest.chars().skip(operator.len()).collect();
            return Ok(Part::Variable(name, Some((operator, parse_quoted(&word)?)), quoted));
        }
        self.at += 1;
        let name: String = match self.peek() {
            Some(c) if c.is_ascii_digit() || "?@#*$!".contains(c) => c.to_string(),
            _ => self.text[self.at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect(),
        };
        self.at += name.chars().count();
        if name.is_empty() {
            return Ok(Part::Quoted("$".to_string()));
        }
        Ok(Part::Variable(name, None, quoted))
    }

    fn until_closed(&mut self, open: char, close: char) -> Parsed<String> {
        let mut depth = 1;
        let start = self.at;
        while let Some(c) = self.peek() {
            self.at += 1;
            if c == open {
                depth += 1;
            } else if c == close {
                depth -= 1;
                if depth == 0 {
                    return Ok(self.text[start..self.at - 1].iter().collect());
                }
            }
        }
        Err(format!("syntax error: {:?} is missing", close))
    }
}

fn flush(word: &mut Word, text: &mut String) {
    if !text.is_empty() {
        word.push(Part::Text(std::mem::take(text)));
    }
}

fn plain(word: &Word) -> Option<String> {
    match word.as_slice() {
        [Part::Text(text)] => Some(text.clone()),
        _ => None,
    }
}
