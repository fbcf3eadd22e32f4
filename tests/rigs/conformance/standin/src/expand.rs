//! Words become arguments: variables, `$(...)`, `$((...))`, field splitting, and `*` in the last name of a path.

use std::fs;

use crate::parse::{Part, Word};
use crate::shell::Shell;

/// The arguments that words become.
pub fn fields(shell: &mut Shell, words: &[Word]) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    for word in words {
        if let [Part::Variable(name, None, true)] | [Part::Quoted(_), Part::Variable(name, None, true)] = word.as_slice()
        {
            if name == "@" {
                found.extend(shell.arguments.iter().cloned());
                continue;
            }
        }
        for field in split(shell, word)? {
            found.extend(glob(field));
        }
    }
    Ok(found)
}

/// One string: in an assignment, in quotes, as a redirection's target.
pub fn text(shell: &mut Shell, word: &[Part]) -> Result<String, String> {
    let mut whole = String::new();
    for part in word {
        whole.push_str(&value(shell, part)?.0);
    }
    Ok(whole)
}

struct Field {
    text: String,
    globs: bool,
}

fn split(shell: &mut Shell, word: &[Part]) -> Result<Vec<Field>, String> {
    let mut done: Vec<Field> = Vec::new();
    let mut current: Option<Field> = None;
    for part in word {
        let (text, splits) = value(shell, part)?;
        if !splits {
            let field = current.get_or_insert(Field { text: String::new(), globs: false });
            field.text.push_str(&text);
            field.globs |= matches!(part, Part::Text(_)) && text.contains('*');
            continue;
        }
        for c in text.chars() {
            if c == ' ' || c == '\t' || c == '\n' {
                done.extend(current.take());
            } else {
                current.get_or_insert(Field { text: String::new(), globs: false }).text.push(c);
            }
        }
    }
    done.extend(current);
    Ok(done)
}

/// The text of a part, and whether it is split into fields.
fn value(shell: &mut Shell, part: &Part) -> Result<(String, bool), String> {
    Ok(match part {
        Part::Text(text) | Part::Quoted(text) => (text.clone(), false),
        Part::Command(node, quoted) => {
            let output = shell.capture(node);
            (output.trim_end_matches('\n').to_string(), !quoted)
        }
        Part::Arithmetic(word, quoted) => {
            let expression = text(shell, word)?;
            (arithmetic(shell, &expression)?.to_string(), !quoted)
        }
        Part::Variable(name, operation, quoted) => {
            let found = shell.variable(name);
            let text = match operation {
                None => found.unwrap_or_default(),
                Some((operator, word)) => {
                    let given = match operator.chars().next() {
                        Some(':') => found.filter(|value| !value.is_empty()),
                        _ => found,
                    };
                    match (given, operator.trim_start_matches(':')) {
                        (Some(_), "+") => text(shell, word)?,
                        (None, "+") => String::new(),
                        (Some(value), _) => value,
                        (None, "-") => text(shell, word)?,
                        (None, "=") => {
                            let value = text(shell, word)?;
                            shell.set(name, &value);
                            value
                        }
                        (None, "?") => return Err(format!("{}: parameter not set", name)),
                        (None, other) => return Err(format!("${{{}{}}}: bad substitution", name, other)),
                    }
                }
            };
            (text, !quoted)
        }
    })
}

fn glob(field: Field) -> Vec<String> {
    if !field.globs {
        return vec![field.text];
    }
    let (folder, pattern) = match field.text.rsplit_once('/') {
        Some((folder, pattern)) => (format!("{}/", folder), pattern),
        None => (String::new(), field.text.as_str()),
    };
    let listed = fs::read_dir(if folder.is_empty() { "." } else { &folder });
    let mut names: Vec<String> = listed
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && matches(pattern, name))
        .map(|name| format!("{}{}", folder, name))
        .collect();
    names.sort();
    if names.is_empty() {
        names.push(field.text);
    }
    names
}

fn matches(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or("");
    let mut rest = match name.strip_prefix(first) {
        Some(rest) => rest,
        None => return false,
    };
    let mut last = "";
    for piece in pieces {
        last = piece;
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.is_empty() || last.is_empty() || name.ends_with(last)
}

/// `+ - * / %`, parentheses, comparisons; names are variables.
fn arithmetic(shell: &Shell, expression: &str) -> Result<i64, String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut chars = expression.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_whitespace() {
            continue;
        }
        let mut token = c.to_string();
        if c.is_alphanumeric() || c == '_' {
            while let Some(next) = chars.next_if(|next| next.is_alphanumeric() || *next == '_') {
                token.push(next);
            }
        } else if "<>=!".contains(c) {
            token.extend(chars.next_if_eq(&'='));
        }
        if token != "$" {
            tokens.push(token);
        }
    }
    tokens.reverse();
    let result = binary(shell, &mut tokens, 0)?;
    match tokens.pop() {
        None => Ok(result),
        Some(token) => Err(format!("arithmetic: {:?} is not understood", token)),
    }
}

const LEVELS: [&[&str]; 3] = [&["<", ">", "<=", ">=", "==", "!="], &["+", "-"], &["*", "/", "%"]];

fn binary(shell: &Shell, tokens: &mut Vec<String>, level: usize) -> Result<i64, String> {
    if level == LEVELS.len() {
        return operand(shell, tokens);
    }
    let mut left = binary(shell, tokens, level + 1)?;
    while tokens.last().map_or(false, |token| LEVELS[level].contains(&token.as_str())) {
        let operator = tokens.pop().unwrap_or_default();
        let right = binary(shell, tokens, level + 1)?;
        left = match operator.as_str() {
            "+" => left.wrapping_add(right),
            "-" => left.wrapping_sub(right),
            "*" => left.wrapping_mul(right),
            "/" | "%" if right == 0 => return Err("arithmetic: divide by zero".to_string()),
            "/" => left / right,
            "%" => left % right,
            "<" => i64::from(left < right),
            ">" => i64::from(left > right),
            "<=" => i64::from(left <= right),
            ">=" => i64::from(left >= right),
            "==" => i64::from(left == right),
            _ => i64::from(left != right),
        };
    }
    Ok(left)
}

fn operand(shell: &Shell, tokens: &mut Vec<String>) -> Result<i64, String> {
    let token = tokens.pop().ok_or("arithmetic: an operand is missing")?;
    match token.as_str() {
        "-" => Ok(-operand(shell, tokens)?),
        "(" => {
            let inside = binary(shell, tokens, 0)?;
            match tokens.pop().as_deref() {
                Some(")") => Ok(inside),
                _ => Err("arithmetic: ')' is missing".to_string()),
            }
        }
        _ => match token.parse() {
            Ok(number) => Ok(number),
            Err(_) => {
                let value = shell.variable(&token).unwrap_or_default();
                value.parse().or(if value.is_empty() { Ok(0) } else { Err(format!("{}: not a number", token)) })
            }
        },
    }
}
