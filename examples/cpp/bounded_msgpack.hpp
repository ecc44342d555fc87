// msgpack for small messages from a process that you do not trust. In place of a library: no length that a message only
// claims takes memory, and no nesting takes stack. Each read() is false if the bytes are not such a value.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace edge_agent {

using Value = std::variant<double, std::string>;
using Values = std::map<std::string, Value>;

inline bool is_utf8(std::string_view s) {
    const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(s[at]); };
    for (std::size_t i = 0, n = 0; i < s.size(); i += n) {
        n = byte(i) < 0x80 ? 1 : byte(i) < 0xc2 ? 0 : byte(i) < 0xe0 ? 2 : byte(i) < 0xf0 ? 3 : byte(i) < 0xf5 ? 4 : 0;
        if (n == 0 || n > s.size() - i) return false;
        for (std::size_t k = i + 1; k < i + n; ++k)
            if ((byte(k) & 0xc0) != 0x80) return false;
        const unsigned start = n < 3 ? 0 : byte(i) * 256u + byte(i + 1);
        const bool is_overlong = (start >= 0xe080 && start < 0xe0a0) || (start >= 0xf080 && start < 0xf090);
        const bool is_surrogate = start >= 0xeda0 && start < 0xedc0;
        if (is_overlong || is_surrogate || start >= 0xf490) return false;
    }
    return true;
}

class Reader {
  public:
    enum Kind { nil, boolean, integer, real, text, bytes, list, map, other };  // other: extension, beyond int64
    struct Token {
        Kind kind = nil;
        std::uint64_t count = 0;  // list, map: how many values follow
        std::int64_t number = 0;  // integer, boolean
        double real = 0;          // real, integer
        std::string_view string;  // text, bytes: part of the message
    };
    struct Field {
        std::string_view name;
        std::function<bool(Reader&)> read;
        bool is_required = true;
        bool is_found = false;
    };
    using Fields = std::vector<Field>;

    explicit Reader(std::string_view message) : left_(message) {}
    bool is_at_end() const { return left_.empty(); }

    bool next(Token& token) {
        std::uint64_t head = 0;
        token = {};
        if (!take_number(1, head) || head == 0xc1) return false;
        if (head < 0x80 || head >= 0xe0) return set_integer(token, static_cast<std::int8_t>(head));
        if (head < 0x90) return set_count(token, map, 2 * (head & 15));
        if (head < 0xa0) return set_count(token, list, head & 15);
        if (head < 0xc0) return take_string(token, text, head & 31);
        if (head == 0xc0) return true;
        if (head < 0xc4) return set_boolean(token, head == 0xc3);
        if (head >= 0xd4 && head <= 0xd8) return take_string(token, other, 1 + (1u << (head - 0xd4)));
        static constexpr unsigned widths[] = {1, 2, 4, 1, 2, 4, 4, 8, 1, 2, 4, 8, 1, 2,
                                              4, 8, 0, 0, 0, 0, 0, 1, 2, 4, 2, 4, 2, 4};  // from 0xc4
        const unsigned width = widths[head - 0xc4];
        std::uint64_t n = 0;
        if (!take_number(width, n)) return false;
        if (head <= 0xc6) return take_string(token, bytes, n);
        if (head <= 0xc9) return take_string(token, other, n + 1);
        if (head <= 0xcb) return set_real(token, n, width);
        if (head <= 0xcf) return set_integer(token, static_cast<std::int64_t>(n), n > INT64_MAX ? other : integer);
        if (head <= 0xd3) return set_integer(token, static_cast<std::int64_t>(n << (64 - 8 * width)) >> (64 - 8 * width));
        if (head <= 0xdb) return take_string(token, text, n);
        return head <= 0xdd ? set_count(token, list, n) : set_count(token, map, 2 * n);
    }
    bool skip() {
        Token token;
        for (std::uint64_t n_open = 1; n_open > 0; n_open += token.count - 1)
            if (!next(token)) return false;
        return true;
    }
    bool read(std::int64_t& value) {
        Token token;
        if (!next(token) || token.kind != integer) return false;
        value = token.number;
        return true;
    }
    bool read(bool& value) {
        Token token;
        if (!next(token) || token.kind != boolean) return false;
        value = token.number != 0;
        return true;
    }
    bool read(double& value) {  // finite
        Value found;
        if (!read(found) || !std::holds_alternative<double>(found)) return false;
        value = std::get<double>(found);
        return true;
    }
    bool read(std::string& value) {
        Value found;
        if (!read(found) || !std::holds_alternative<std::string>(found)) return false;
        value = std::get<std::string>(found);
        return true;
    }
    bool read(Value& value) {
        Token token;
        if (!next(token)) return false;
        if (token.kind == text) value = std::string(token.string);
        else value = token.real;
        return token.kind == text ? is_utf8(token.string) : is_number(token);
    }
    template <class T> bool read(std::vector<T>& values) {
        Token token;
        if (!next(token) || token.kind != list) return false;
        for (values.clear(); token.count > 0; --token.count)
            if (!read(values.emplace_back())) return false;
        return true;
    }
    template <class T> bool read(std::map<std::string, T>& values) {  // no key twice
        Token token;
        std::string key;
        if (!next(token) || token.kind != map) return false;
        for (values.clear(); token.count > 0; token.count -= 2)
            if (!read(key) || values.count(key) > 0 || !read(values[key])) return false;
        return true;
    }
    bool read(Fields& fields) {  // a map with these fields, none twice; others are ignored
        Token token;
        std::string key;
        if (!next(token) || token.kind != map) return false;
        for (; token.count > 0; token.count -= 2) {
            if (!read(key)) return false;
            const auto field = std::find_if(fields.begin(), fields.end(), [&](Field& f) { return f.name == key; });
            if (field == fields.end() ? !skip() : field->is_found || !field->read(*this)) return false;
            if (field != fields.end()) field->is_found = true;
        }
        return std::all_of(fields.begin(), fields.end(), [](Field& f) { return f.is_found || !f.is_required; });
    }

  private:
    static bool is_number(const Token& t) { return (t.kind == real || t.kind == integer) && std::isfinite(t.real); }
    static bool set_count(Token& token, Kind kind, std::uint64_t count) {
        token.kind = kind;
        token.count = count;
        return true;
    }
    static bool set_boolean(Token& token, bool value) {
        token.kind = boolean;
        token.number = value;
        return true;
    }
    static bool set_integer(Token& token, std::int64_t number, Kind kind = integer) {
        token.kind = kind;
        token.number = number;
        token.real = static_cast<double>(number);
        return true;
    }
    static bool set_real(Token& token, std::uint64_t bits, unsigned width) {
        const auto low_bits = static_cast<std::uint32_t>(bits);
        float narrow = 0;
        std::memcpy(&narrow, &low_bits, sizeof narrow);
        std::memcpy(&token.real, &bits, sizeof token.real);
        if (width == 4) token.real = static_cast<double>(narrow);
        token.kind = real;
        return true;
    }
    bool take_number(unsigned width, std::uint64_t& number) {  // big-endian
        if (width > left_.size()) return false;
        for (unsigned i = 0; i < width; ++i) number = number << 8 | static_cast<unsigned char>(left_[i]);
        left_.remove_prefix(width);
        return true;
    }
    bool take_string(Token& token, Kind kind, std::uint64_t size) {
        if (size > left_.size()) return false;
        token.kind = kind;
        token.string = left_.substr(0, size);
        left_.remove_prefix(size);
        return true;
    }

    std::string_view left_;
};

template <class T> Reader::Field field(std::string_view name, T& to, bool is_required = true) {
    return {name, [&to](Reader& reader) { return reader.read(to); }, is_required};
}

class Writer {
  public:
    explicit Writer(unsigned n_fields) { put(static_cast<char>(0x80 + n_fields), 0, 0); }  // a map with up to 15
    Writer& add(std::string_view name, std::string_view value) {
        put_text(name);
        put_text(value);
        return *this;
    }
    Writer& add(std::string_view name, std::int64_t value) {
        put_text(name);
        put('\xd3', static_cast<std::uint64_t>(value), 8);
        return *this;
    }
    std::string bytes;

  private:
    void put(char head, std::uint64_t number, int width) {
        bytes += head;
        while (width-- > 0) bytes += static_cast<char>(number >> 8 * width & 255);
    }
    void put_text(std::string_view value) {
        put('\xdb', value.size(), 4);
        bytes += value;
    }
};

}  // namespace edge_agent
