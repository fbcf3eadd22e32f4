//! Running what the grammar knows, in one process.

use std::cell::RefCell;
use std::collections::HashMap;
use std::env;
use std::fs::{self, OpenOptions};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::applets;
use crate::expand;
use crate::parse::{self, Node, Redirection};
use crate::streams::{describe, Sink, Streams};

/// Why commands are left early.
pub enum Leave {
    Exit(i32),
    Return(i32),
    Break,
    Continue,
}

type Ran = Result<i32, Leave>;

#[derive(Clone)]
pub struct Shell {
    variables: HashMap<String, String>,
    functions: HashMap<String, Rc<Node>>,
    pub arguments: Vec<String>,
    name: String,
    last: i32,
    exit_on_error: bool,
    streams: Streams,
    random: u32,
}

/// `sh [-ecx] SCRIPT [NAME ARGUMENTS...]`; without `-c` the script is a file, or what comes on stdin.
pub fn main(words: &[String], streams: &Streams) -> i32 {
    let mut words = words.iter();
    let (mut flags, mut next) = (String::new(), words.next());
    while let Some(word) = next.filter(|word| word.starts_with('-')) {
        flags.push_str(word);
        next = words.next();
    }
    let (script, name) = match next {
        Some(script) if flags.contains('c') => (script.clone(), words.next().cloned()),
        Some(path) => match fs::read_to_string(path) {
            Ok(script) => (script, Some(path.clone())),
            Err(error) => {
                streams.complain(&format!("sh: {}: {}", path, describe(&error)));
                return 127;
            }
        },
        None => (String::from_utf8_lossy(&streams.read()).into_owned(), None),
    };
    let mut shell = Shell {
        variables: env::vars().collect(),
        functions: HashMap::new(),
        arguments: words.cloned().collect(),
        name: name.unwrap_or_else(|| "sh".to_string()),
        last: 0,
        exit_on_error: flags.contains('e'),
        streams: streams.clone(),
        random: SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.subsec_nanos() | 1),
    };
    shell.script(&script)
}

impl Shell {
    fn script(&mut self, text: &str) -> i32 {
        match parse::parse(text) {
            Ok(list) => self.finish(&list),
            Err(problem) => self.fail(&problem),
        }
    }

    fn finish(&mut self, node: &Node) -> i32 {
        match self.run(node) {
            Ok(code) | Err(Leave::Exit(code)) | Err(Leave::Return(code)) => code,
            Err(Leave::Break) | Err(Leave::Continue) => 0,
        }
    }

    fn fail(&self, problem: &str) -> i32 {
        self.streams.complain(&format!("sh: {}", problem));
        2
    }

    pub fn variable(&self, name: &str) -> Option<String> {
        match name {
            "?" => Some(self.last.to_string()),
            "#" => Some(self.arguments.len().to_string()),
            "@" | "*" => Some(self.arguments.join(" ")),
            "$" => Some("1".to_string()),
            "0" => Some(self.name.clone()),
            "RANDOM" => Some(((self.random >> 8) % 32768).to_string()),
            _ => match name.parse::<usize>() {
                Ok(index) => self.arguments.get(index.wrapping_sub(1)).cloned(),
                Err(_) => self.variables.get(name).cloned(),
            },
        }
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_string(), value.to_string());
    }

    /// Run a node in a shell of its own and return what it wrote.
    pub fn capture(&mut self, node: &Node) -> String {
        let buffer = Rc::new(RefCell::new(Vec::new()));
        let mut inner = self.clone();
        inner.streams.out = Sink::Buffer(Rc::clone(&buffer));
        self.last = inner.finish(node);
        let output = String::from_utf8_lossy(&buffer.borrow()).into_owned();
        output
    }

    fn run(&mut self, node: &Node) -> Ran {
        let code = match node {
            Node::List(nodes) => {
                let mut code = 0;
                for node in nodes {
                    code = self.run(node)?;
                    self.last = code;
                    let tested = matches!(node, Node::And(..) | Node::Or(..) | Node::Not(_));
                    if code != 0 && self.exit_on_error && !tested {
                        return Err(Leave::Exit(code));
                    }
                }
                code
            }
            Node::And(left, right) => match self.condition(left)? {
                0 => self.run(right)?,
                code => code,
            },
            Node::Or(left, right) => match self.condition(left)? {
                0 => 0,
                _ => self.run(right)?,
            },
            Node::Not(inner) => i32::from(self.condition(inner)? == 0),
            Node::Pipe(nodes) => {
                let mut inner = self.clone();
                let mut code = 0;
                for (index, node) in nodes.iter().enumerate() {
                    let buffer = Rc::new(RefCell::new(Vec::new()));
                    let last = index + 1 == nodes.len();
                    inner.streams.out = if last { self.streams.out.clone() } else { Sink::Buffer(Rc::clone(&buffer)) };
                    code = inner.finish(node);
                    inner.streams.input = Some(Rc::new(buffer.borrow().clone()));
                }
                code
            }
            Node::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.condition(condition)? == 0 {
                        return self.run(body);
                    }
                }
                otherwise.as_ref().map_or(Ok(0), |body| self.run(body))?
            }
            Node::While(until, condition, body) => {
                let mut code = 0;
                while (self.condition(condition)? == 0) != *until {
                    match self.run(body) {
                        Ok(ran) => code = ran,
                        Err(Leave::Break) => break,
                        Err(Leave::Continue) => {}
                        Err(leave) => return Err(leave),
                    }
                }
                code
            }
            Node::For(name, words, body) => {
                let mut code = 0;
                for value in self.expanded(words)? {
                    self.set(name, &value);
                    match self.run(body) {
                        Ok(ran) => code = ran,
                        Err(Leave::Break) => break,
                        Err(Leave::Continue) => {}
                        Err(leave) => return Err(leave),
                    }
                }
                code
            }
            Node::Subshell(list) => self.clone().finish(list),
            Node::Function(name, body) => {
                self.functions.insert(name.clone(), Rc::clone(body));
                0
            }
            Node::Redirected(inner, redirections) => {
                let before = self.streams.clone();
                let ran = match self.redirect(redirections) {
                    Ok(()) => self.run(inner),
                    Err(problem) => {
                        self.fail(&problem);
                        Ok(1)
                    }
                };
                self.streams = before;
                ran?
            }
            Node::Simple { assignments, words, redirections } => {
                let before = self.streams.clone();
                let ran = self.simple(assignments, words, redirections);
                self.streams = before;
                ran?
            }
        };
        self.last = code;
        Ok(code)
    }

    /// As `run`, but a failure in it never ends a shell with `-e`.
    fn condition(&mut self, node: &Node) -> Ran {
        let before = std::mem::replace(&mut self.exit_on_error, false);
        let ran = self.run(node);
        self.exit_on_error = before;
        ran
    }

    fn expanded(&mut self, words: &[parse::Word]) -> Result<Vec<String>, Leave> {
        self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        expand::fields(self, words).map_err(|problem| Leave::Exit(self.fail(&problem)))
    }

    fn simple(
        &mut self,
        assignments: &[(String, parse::Word)],
        words: &[parse::Word],
        redirections: &[Redirection],
    ) -> Ran {
        let argv = self.expanded(words)?;
        if let Err(problem) = self.redirect(redirections) {
            self.fail(&problem);
            return Ok(1);
        }
        let mut given = Vec::new();
        for (name, word) in assignments {
            let value = expand::text(self, word).map_err(|problem| Leave::Exit(self.fail(&problem)))?;
            given.push((name.clone(), value));
        }
        if argv.is_empty() {
            for (name, value) in given {
                self.set(&name, &value);
            }
            return Ok(0);
        }
        let mut inner = self.clone();
        inner.variables.extend(given.iter().cloned());
        let shell = if given.is_empty() { self } else { &mut inner };
        shell.execute(&argv)
    }

    fn execute(&mut self, argv: &[String]) -> Ran {
        let first = argv.get(1).map_or("", String::as_str);
        let code = || first.parse().unwrap_or(0);
        match argv[0].as_str() {
            ":" => Ok(0),
            "exit" => Err(Leave::Exit(if first.is_empty() { self.last } else { code() })),
            "return" => Err(Leave::Return(if first.is_empty() { self.last } else { code() })),
            "break" => Err(Leave::Break),
            "continue" => Err(Leave::Continue),
            "set" => {
                self.exit_on_error |= first.starts_with('-') && first.contains('e');
                Ok(0)
            }
            "export" => {
                for word in &argv[1..] {
                    if let Some((name, value)) = word.split_once('=') {
                        self.set(name, value);
                    }
                }
                Ok(0)
            }
            // A module is never sent a signal, so what is said here is never done.
            "trap" => Ok(0),
            "exec" if argv.len() > 1 => Err(Leave::Exit(self.execute(&argv[1..])?)),
            "eval" => Ok(self.script(&argv[1..].join(" "))),
            "env" | "printenv" if argv.len() == 1 => {
                let mut all: Vec<String> = self.variables.iter().map(|(k, v)| format!("{}={}", k, v)).collect();
                all.sort();
                Ok(self.streams.say(&all.join("\n")))
            }
            "sh" | "/bin/sh" | "bash" | "/bin/bash" => Ok(main(&argv[1..], &self.streams)),
            name => {
                if let Some(body) = self.functions.get(name).cloned() {
                    let before = std::mem::replace(&mut self.arguments, argv[1..].to_vec());
                    let ran = self.run(&body);
                    self.arguments = before;
                    return match ran {
                        Err(Leave::Return(code)) => Ok(code),
                        other => other,
                    };
                }
                Ok(applets::program(argv, &self.streams).unwrap_or_else(|| {
                    self.streams.complain(&format!("sh: {}: not found", name));
                    127
                }))
            }
        }
    }

    fn redirect(&mut self, redirections: &[Redirection]) -> Result<(), String> {
        for redirection in redirections {
            let target = expand::text(self, &redirection.target)?;
            if redirection.operator == "<" {
                let data = fs::read(&target).map_err(|error| format!("{}: {}", target, describe(&error)))?;
                self.streams.input = Some(Rc::new(data));
                continue;
            }
            let sink = match (redirection.operator.as_str(), target.as_str()) {
                (">&", "1") => self.streams.out.clone(),
                (">&", "2") => self.streams.err.clone(),
                (_, "/dev/null") => Sink::Nowhere,
                (_, "/dev/stdout") => self.streams.out.clone(),
                (_, "/dev/stderr") => self.streams.err.clone(),
                (operator, path) => {
                    let mut options = OpenOptions::new();
                    options.create(true).write(true);
                    match operator {
                        ">>" => options.append(true),
                        _ => options.truncate(true),
                    };
                    // busybox's words, which tests look for.
                    let opened = options.open(path);
                    let file = opened.map_err(|error| format!("can't create {}: {}", path, describe(&error)))?;
                    Sink::File(Rc::new(file))
                }
            };
            if redirection.operator == "&>" {
                self.streams.err = sink.clone();
                self.streams.out = sink;
            } else if redirection.descriptor == 2 {
                self.streams.err = sink;
            } else {
                self.streams.out = sink;
            }
        }
        Ok(())
    }
}
