//! Tables for people: aligned columns under upper-case headers, two spaces between them.

use std::fmt;

use comfy_table::{ContentArrangement, Row, presets};

/// A table that is printed as text.
#[derive(Debug)]
pub struct Table(comfy_table::Table);

impl Table {
    /// A table with these columns. On a terminal it is made to fit its width by wrapping; in a pipe
    /// every row is one line.
    pub fn new<'h>(headers: impl IntoIterator<Item = &'h str>) -> Self {
        let width = terminal_size::terminal_size().map(|(width, _)| width.0);
        Self::with_width(headers, width)
    }

    fn with_width<'h>(headers: impl IntoIterator<Item = &'h str>, width: Option<u16>) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_preset(presets::NOTHING).set_header(
            headers
                .into_iter()
                .map(|header| printable(header).to_uppercase()),
        );
        if let Some(width) = width {
            table.set_content_arrangement(ContentArrangement::Dynamic);
            // Lines are shortened by the spaces at their end, see Display.
            table.set_width(width);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        Self(table)
    }

    /// Adds a row.
    pub fn row<C: fmt::Display>(&mut self, cells: impl IntoIterator<Item = C>) {
        let cells = cells.into_iter().map(|cell| printable(&cell.to_string()));
        self.0.add_row(Row::from(cells.collect::<Vec<_>>()));
    }
}

/// An agent's error text must not be able to move the cursor or to begin a line of its own.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self
            .0
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect();
        f.write_str(&lines.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(width: Option<u16>, rows: &[[&str; 2]], expected: &[&str]) {
        let mut table = Table::with_width(["name", "error"], width);
        for row in rows {
            table.row(row);
        }
        assert_eq!(table.to_string().lines().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn columns_are_aligned_and_nothing_is_drawn() {
        check(
            None,
            &[["web1", ""], ["database-12", "disk full"]],
            &["NAME         ERROR", "web1", "database-12  disk full"],
        );
        check(None, &[], &["NAME  ERROR"]);
    }

    #[test]
    fn a_long_cell_is_wrapped_on_a_terminal_only() {
        let rows = [["web1", "no space left on the device"]];
        check(
            None,
            &rows,
            &["NAME  ERROR", "web1  no space left on the device"],
        );
        check(
            Some(24),
            &rows,
            &["NAME  ERROR", "web1  no space left on", "      the device"],
        );
    }

    #[test]
    fn a_cell_cannot_talk_to_the_terminal() {
        check(
            None,
            &[["a\x1b[2J", "b\nc"]],
            &["NAME   ERROR", "a [2J  b c"],
        );
    }
}
