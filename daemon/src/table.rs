//! Tables for people: aligned columns under upper-case headers, two spaces between them.
//!
//! On a terminal a table fits its width and no word is broken that need not be: columns with several
//! words are wrapped, and where even that does not fit, the last columns stand beneath their row as
//! `header: text`. In a pipe every row is one line, whatever its length.

use std::fmt;

use console::{Term, measure_text_width};

/// Spaces between two columns.
const GAP: usize = 2;

/// A column is not wrapped to less than this, if that is more than its longest word: narrower text is
/// better read beneath the row.
const WRAPPED_MIN: usize = 20;

/// How far what stands beneath a row is indented.
const INDENT: usize = 4;

/// A stream's columns that stand side by side are not wider than this on a terminal, so that one
/// monstrous name does not move all others beneath their rows for good.
const STREAMED_MAX: usize = 40;

/// Columns of the terminal that stdout is; `None` for a pipe or a file, where nothing is wrapped.
pub fn terminal_width() -> Option<usize> {
    let (_, columns) = Term::stdout().size_checked()?;
    (columns > 0).then_some(columns.into()) // a serial console may say 0
}

/// A peer's text as it may be shown: it cannot move the cursor, begin a line of its own, or look like
/// another text. Control characters become blanks, and invisible and bidirectional characters are
/// escaped as in `\u{202e}` (Trojan Source, CVE-2021-42574).
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            shown.push(' ');
        } else if is_invisible(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// JSON for people and programs, safe to show on a terminal.
pub fn json(value: &serde_json::Value) -> String {
    printable_json(&format!("{value:#}"))
}

/// JSON with invisible and bidirectional characters escaped, which occur in strings alone.
pub fn printable_json(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    let mut units = [0; 2];
    for c in json.chars() {
        if is_invisible(c) {
            let units = c.encode_utf16(&mut units);
            shown.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Whether a character shows nothing of its own or changes how others are shown: format characters,
/// separators, private and unassigned code points, and variation selectors. The tables are those of
/// [`char::escape_debug`]; combining marks, which it escapes as well, belong to texts.
fn is_invisible(c: char) -> bool {
    if c.is_ascii() {
        return false;
    }
    let is_selector = matches!(c, '\u{fe00}'..='\u{fe0f}' | '\u{e0100}'..='\u{e01ef}');
    let fills_nothing = matches!(
        c,
        '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' | '\u{034f}'
    );
    let after_a_letter = format!("a{c}"); // where a combining mark may stand
    let is_escaped = after_a_letter.escape_debug().nth(1) == Some('\\');
    is_selector || fills_nothing || is_escaped
}

/// A table whose rows are all known when it is printed.
#[derive(Debug)]
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
    width: Option<usize>,
}

impl Table {
    /// A table with these columns, for stdout as it is.
    pub fn new<'h>(headers: impl IntoIterator<Item = &'h str>) -> Self {
        Self::with_width(headers, terminal_width())
    }

    /// A table with these columns, for a terminal of this width or a pipe.
    pub fn with_width<'h>(
        headers: impl IntoIterator<Item = &'h str>,
        width: Option<usize>,
    ) -> Self {
        Self {
            columns: headers.into_iter().map(Column::new).collect(),
            rows: Vec::new(),
            width,
        }
    }

    /// Adds a row.
    pub fn row<C: fmt::Display>(&mut self, cells: impl IntoIterator<Item = C>) {
        let cells = printable_cells(cells);
        for (column, cell) in self.columns.iter_mut().zip(&cells) {
            column.admit(cell);
        }
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = side_by_side(&self.columns, self.width);
        let mut lines = vec![header(&self.columns, &widths)];
        for row in &self.rows {
            lines.extend(row_lines(&self.columns, &widths, row, self.width));
        }
        f.write_str(&lines.join("\n"))
    }
}

/// A table that is printed while its rows still come.
///
/// In a pipe a row's line depends on nothing but the row: its columns have the widths that they were
/// given, or more where a cell needs more. On a terminal a column is as wide as its widest cell so
/// far, and rows that come together are looked at together.
#[derive(Debug)]
pub struct Stream {
    columns: Vec<Column>,
    piped: Vec<usize>,
    begun: bool,
}

impl Stream {
    /// A table with these columns, and how wide they are in a pipe.
    pub fn new<'h>(columns: impl IntoIterator<Item = (&'h str, usize)>) -> Self {
        let columns = columns.into_iter();
        let (columns, piped) = columns
            .map(|(header, piped)| (Column::new(header), piped))
            .unzip();
        Self {
            columns,
            piped,
            begun: false,
        }
    }

    /// The lines of these rows, for a terminal of this width or a pipe; before the first of all, the
    /// header.
    pub fn lines(
        &mut self,
        rows: impl IntoIterator<Item = Vec<String>>,
        width: Option<usize>,
    ) -> Vec<String> {
        let rows: Vec<_> = rows.into_iter().map(printable_cells).collect();
        if width.is_some() {
            for row in &rows {
                for (column, cell) in self.columns.iter_mut().zip(row) {
                    column.admit(cell);
                }
            }
            let last = self.columns.len().saturating_sub(1);
            for column in &mut self.columns[..last] {
                column.widest = column.widest.min(STREAMED_MAX);
                column.longest_word = column.longest_word.min(STREAMED_MAX);
            }
        }
        let widths = match width {
            Some(_) => side_by_side(&self.columns, width),
            None => self.piped.clone(),
        };
        let mut lines = Vec::new();
        if !self.begun && !rows.is_empty() {
            self.begun = true;
            lines.push(header(&self.columns, &widths));
        }
        for row in &rows {
            lines.extend(row_lines(&self.columns, &widths, row, width));
        }
        lines
    }
}

#[derive(Debug)]
struct Column {
    header: String,
    widest: usize,
    longest_word: usize,
}

impl Column {
    fn new(header: &str) -> Self {
        let header = printable(header).to_uppercase();
        let widest = measure_text_width(&header);
        Self {
            header,
            widest,
            longest_word: widest,
        }
    }

    fn admit(&mut self, cell: &str) {
        self.widest = self.widest.max(measure_text_width(cell));
        let longest_word = words(cell)
            .map(|word| measure_text_width(word.trim_end()))
            .max();
        self.longest_word = self.longest_word.max(longest_word.unwrap_or(0));
    }

    /// The least that the column can be without a broken word and still be read.
    fn least(&self) -> usize {
        self.widest.min(self.longest_word.max(WRAPPED_MIN))
    }
}

fn printable_cells<C: fmt::Display>(cells: impl IntoIterator<Item = C>) -> Vec<String> {
    cells
        .into_iter()
        .map(|cell| printable(&cell.to_string()))
        .collect()
}

/// The widths of the columns that stand side by side; the others stand beneath. The first always
/// stands.
fn side_by_side(columns: &[Column], width: Option<usize>) -> Vec<usize> {
    let widest: Vec<_> = columns.iter().map(|column| column.widest).collect();
    let Some(width) = width else {
        return widest;
    };
    let gaps = |count: usize| GAP * count.saturating_sub(1);
    for count in (1..=columns.len()).rev() {
        let room = width.saturating_sub(gaps(count));
        let least = columns[..count].iter().map(Column::least);
        if least.clone().sum::<usize>() > room && count > 1 {
            continue;
        }
        let mut widths = widest[..count].to_vec();
        let mut excess = widths.iter().sum::<usize>().saturating_sub(room);
        let least: Vec<_> = least.collect();
        while excess > 0 {
            let shrinkable = (0..count).filter(|at| widths[*at] > least[*at]);
            let Some(widest) = shrinkable.max_by_key(|at| widths[*at]) else {
                break; // the first column alone is wider than the terminal
            };
            widths[widest] -= 1;
            excess -= 1;
        }
        return widths;
    }
    widest
}

fn header(columns: &[Column], widths: &[usize]) -> String {
    let cells = columns.iter().map(|column| column.header.as_str());
    aligned(cells.zip(widths))
}

fn row_lines(
    columns: &[Column],
    widths: &[usize],
    row: &[String],
    width: Option<usize>,
) -> Vec<String> {
    let Some(width) = width else {
        return vec![aligned(row.iter().map(String::as_str).zip(widths))];
    };
    let wrapped: Vec<_> = row
        .iter()
        .zip(widths)
        .map(|(cell, width)| fold(cell, *width))
        .collect();
    let height = wrapped.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |at: usize| move |lines: &'_ Vec<String>| lines.get(at).cloned().unwrap_or_default();
    let mut lines: Vec<_> = (0..height)
        .map(|at| {
            let cells: Vec<_> = wrapped.iter().map(cell(at)).collect();
            aligned(cells.iter().map(String::as_str).zip(widths))
        })
        .collect();
    let beneath = columns.iter().zip(row).skip(widths.len());
    let told = beneath.filter(|(_, cell)| !cell.is_empty() && *cell != "-");
    let told = told.map(|(column, cell)| format!("{}: {cell}", column.header.to_lowercase()));
    let told = told.collect::<Vec<_>>().join("  ");
    if !told.is_empty() {
        let told = fold(&told, width.saturating_sub(INDENT));
        lines.extend(told.iter().map(|line| format!("{:INDENT$}{line}", "")));
    }
    lines
}

fn aligned<'c>(cells: impl Iterator<Item = (&'c str, &'c usize)>) -> String {
    let mut line = String::new();
    for (cell, width) in cells {
        let fill = width.saturating_sub(measure_text_width(cell)) + GAP;
        line.push_str(cell);
        line.extend(std::iter::repeat_n(' ', fill));
    }
    line.truncate(line.trim_end().len());
    line
}

/// `text` in lines of at most `width` columns, broken after spaces and commas, and within a word only
/// if that alone is longer than a line.
pub fn fold(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let (mut lines, mut line, mut used) = (Vec::new(), String::new(), 0);
    let mut end = |line: &mut String| lines.push(std::mem::take(line).trim_end().to_owned());
    for word in words(text) {
        if used > 0 && used + measure_text_width(word.trim_end()) > width {
            end(&mut line);
            used = 0;
        }
        for c in word.chars() {
            let columns = measure_text_width(c.encode_utf8(&mut [0; 4]));
            if c != ' ' && used > 0 && used + columns > width {
                end(&mut line);
                used = 0;
            }
            if c != ' ' || used > 0 {
                line.push(c);
                used += columns;
            }
        }
    }
    end(&mut line);
    lines
}

/// What is not broken if it can be helped, each with what follows it.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive([' ', ','])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(width: Option<usize>, rows: &[[&str; 3]], expected: &[&str]) {
        let mut table = Table::with_width(["name", "groups", "error"], width);
        for row in rows {
            table.row(row);
        }
        assert_eq!(table.to_string().lines().collect::<Vec<_>>(), expected);
    }

    const LONG: [[&str; 3]; 2] = [
        ["web1", "dmz,canary", "no space left on the device"],
        ["web2", "-", "-"],
    ];

    #[test]
    fn invisible_and_bidirectional_characters_are_escaped() {
        for (text, shown) in [
            (
                "größe 数 é e\u{301} ok \\ \"'",
                "größe 数 é e\u{301} ok \\ \"'",
            ),
            ("a\u{202e}b\u{2066}c", "a\\u{202e}b\\u{2066}c"),
            ("web\u{200b}1\u{feff}", "web\\u{200b}1\\u{feff}"),
            (
                "a\u{2028}b\u{ad}\u{e0041}\u{fe0f}",
                "a\\u{2028}b\\u{ad}\\u{e0041}\\u{fe0f}",
            ),
            ("\u{1b}[2Jx\ny\u{9b}", " [2Jx y "),
        ] {
            assert_eq!(printable(text), shown);
        }
        let json = serde_json::json!({ "said": "a\u{202e}b\u{e0041}\n数" });
        let shown = printable_json(&json.to_string());
        assert_eq!(shown, r#"{"said":"a\u202eb\udb40\udc41\n数"}"#);
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
            json
        );
    }

    #[test]
    fn columns_are_aligned_and_nothing_is_drawn() {
        check(
            None,
            &[["web1", "a", ""], ["database-12", "b", "disk full"]],
            &[
                "NAME         GROUPS  ERROR",
                "web1         a",
                "database-12  b       disk full",
            ],
        );
        check(None, &[], &["NAME  GROUPS  ERROR"]);
        check(
            None,
            &[["größe", "a", "x"]],
            &["NAME   GROUPS  ERROR", "größe  a       x"],
        );
    }

    #[test]
    fn a_row_is_one_line_in_a_pipe() {
        check(
            None,
            &LONG,
            &[
                "NAME  GROUPS      ERROR",
                "web1  dmz,canary  no space left on the device",
                "web2  -           -",
            ],
        );
    }

    #[test]
    fn a_long_cell_is_wrapped_between_words_on_a_terminal() {
        check(
            Some(39),
            &LONG,
            &[
                "NAME  GROUPS      ERROR",
                "web1  dmz,canary  no space left on the",
                "                  device",
                "web2  -           -",
            ],
        );
    }

    #[test]
    fn columns_that_do_not_fit_stand_beneath_their_row() {
        check(
            Some(30),
            &LONG,
            &[
                "NAME  GROUPS",
                "web1  dmz,canary",
                "    error: no space left on",
                "    the device",
                "web2  -",
            ],
        );
        check(Some(12), &LONG[1..], &["NAME  GROUPS", "web2  -"]);
        check(Some(1), &LONG[1..], &["NAME", "web2"]);
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in 5..80 {
            let mut table = Table::with_width(["name", "groups", "error"], Some(width));
            for row in LONG {
                table.row(row);
            }
            for line in table.to_string().lines() {
                assert!(line.chars().count() <= width, "{width}: {line}");
            }
        }
    }

    #[test]
    fn a_cell_cannot_talk_to_the_terminal() {
        check(
            None,
            &[["a\x1b[2J", "b\nc", ""]],
            &["NAME   GROUPS  ERROR", "a [2J  b c"],
        );
    }

    fn stream() -> Stream {
        Stream::new([("seq", 4), ("event", 8), ("detail", 0)])
    }

    fn cells(text: &str) -> Vec<String> {
        text.split('|').map(str::to_owned).collect()
    }

    #[test]
    fn a_streamed_line_in_a_pipe_depends_on_its_row_alone() {
        let mut stream = stream();
        assert!(stream.lines([], None).is_empty(), "no header over nothing");
        let first = stream.lines([cells("1|published by hand|all is well")], None);
        assert_eq!(
            first,
            [
                "SEQ   EVENT     DETAIL",
                "1     published by hand  all is well"
            ]
        );
        let second = stream.lines([cells("2|offer|x")], None);
        assert_eq!(second, ["2     offer     x"]);
    }

    #[test]
    fn a_stream_on_a_terminal_stays_as_wide_as_it_was() {
        let mut stream = stream();
        let rows = [cells("1|offer|x"), cells("2|force-sync-end|y")];
        let lines = stream.lines(rows, Some(60));
        assert_eq!(
            lines,
            [
                "SEQ  EVENT           DETAIL",
                "1    offer           x",
                "2    force-sync-end  y"
            ]
        );
        let detail = format!("3|offer|{}", "word ".repeat(9));
        let lines = stream.lines([cells(&detail)], Some(60));
        assert_eq!(
            lines,
            [
                "3    offer           word word word word word word word word",
                "                     word"
            ]
        );
        let lines = stream.lines([cells("4|offer|x y")], Some(30));
        assert_eq!(lines, ["4    offer", "    detail: x y"]);
    }

    #[test]
    fn text_is_folded_after_spaces_and_commas_and_within_a_word_only_if_it_must() {
        let check = |text: &str, width, expected: &[&str]| {
            assert_eq!(fold(text, width), expected, "{text}");
        };
        check("", 5, &[""]);
        check("one two", 7, &["one two"]);
        check("one two", 6, &["one", "two"]);
        check("a=x,y,zz b", 5, &["a=x,", "y,zz", "b"]);
        check("abcdefgh ij", 3, &["abc", "def", "gh", "ij"]);
        check("漢字漢字", 4, &["漢字", "漢字"]);
    }
}
