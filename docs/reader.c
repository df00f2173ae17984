/* The reference reader of packed checkpoints of design-lightning; format.md describes these files. C99, libc alone.

       cc -std=c99 -O2 reader.c -o reader
       reader FILE                             lists the packed layers
       reader FILE LAYER IN.bin H W OUT.bin    runs one of them

   IN.bin and OUT.bin are raw little-endian float32. A conv2d takes [C, H, W]. A linear layer takes an image [H, W, I];
   where H is 0 it takes W tokens, [W, I]; features [I] are an image of 1 x 1.

   Every number of the file is checked before it is used. Whatever is wrong ends the program with one line and the exit
   status 1. A port to a device needs `threshold`, `binarize`, `gather` and `multiply`. */

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FORMAT_VERSION 2
#define MAX_DEPTH 64                 /* of nested JSON */
#define MAX_VALUES ((size_t)1 << 28) /* of a tensor, and of any other size */
#define NONE ((size_t)-1)

/* A text that may be hostile, on one line. */
static void print(FILE *to, const char *text, size_t length) {
    for (; length; length--, text++)
        putc((unsigned char)*text < ' ' || *text == 127 ? '?' : *text, to);
}

static void refuse(const char *format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fputs("reader: ", stderr);
    print(stderr, line, strlen(line));
    fputc('\n', stderr);
    exit(1);
}

static void *allocate(void *old, size_t count, size_t size) {
    void *memory = count > SIZE_MAX / size ? NULL : realloc(old, count ? count * size : 1);
    if (!memory)
        refuse("out of memory");
    return memory;
}

static size_t times(size_t a, size_t b) {
    if (b && a > MAX_VALUES / b)
        refuse("a size is above %zu, which this reader does not take", MAX_VALUES);
    return a * b;
}

static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file)
        refuse("%s cannot be opened", path);
    unsigned char *data = NULL;
    size_t room = 0, got = 1;
    for (*size = 0; got; *size += got) {
        if (*size == room) {
            room = room ? room * 2 : 65536;
            data = allocate(data, room, 1);
        }
        got = fread(data + *size, 1, room - *size, file);
    }
    if (ferror(file))
        refuse("%s cannot be read", path);
    fclose(file);
    return data;
}

/* JSON: a text becomes an array of nodes, and strings lose their escapes where they stand. */

typedef enum { OBJECT, ARRAY, STRING, LITERAL } json_kind;

typedef struct {
    json_kind kind;
    char *text; /* of a string, or of a number, true, false, null; not terminated */
    size_t length;
    size_t child; /* the first one; in an object keys and values take turns */
    size_t next;  /* in the same array or object */
} node;

typedef struct {
    char *text;
    size_t length, at;
    node *nodes; /* the first is the root */
    size_t count, room;
} json;

static int peek(json *j) {
    while (j->at < j->length && j->text[j->at] && strchr(" \t\r\n", j->text[j->at]))
        j->at++;
    return j->at < j->length ? (unsigned char)j->text[j->at] : -1;
}

static void expect(json *j, int character) {
    if (peek(j) != character)
        refuse("the header is no JSON: no '%c' at its byte %zu", character, j->at);
    j->at++;
}

static size_t new_node(json *j, json_kind kind, char *text, size_t length) {
    if (j->count == j->room) {
        j->room = j->room ? j->room * 2 : 256;
        j->nodes = allocate(j->nodes, j->room, sizeof *j->nodes);
    }
    j->nodes[j->count] = (node){kind, text, length, NONE, NONE};
    return j->count++;
}

/* The character behind a backslash. Those beyond ASCII become '?': no name that a reader looks for holds one. */
static char parse_escape(json *j) {
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    char letter = j->at < j->length ? j->text[j->at++] : '\0';
    const char *found = letter ? strchr(letters, letter) : NULL;
    if (found)
        return meanings[found - letters];
    unsigned code = 0;
    for (int i = 0; i < 4; i++, j->at++) {
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        found = letter == 'u' && j->at < j->length && j->text[j->at] ? strchr(digits, j->text[j->at]) : NULL;
        if (!found)
            refuse("the header is no JSON: a bad escape at its byte %zu", j->at);
        code = code << 4 | ((unsigned)(found - digits) & 15);
    }
    return code < 128 ? (char)code : '?';
}

static size_t parse_string(json *j) {
    expect(j, '"');
    char *start = j->text + j->at, *end = start;
    while (j->at < j->length && j->text[j->at] != '"') {
        char character = j->text[j->at++];
        *end++ = character == '\\' ? parse_escape(j) : character;
    }
    expect(j, '"');
    return new_node(j, STRING, start, (size_t)(end - start));
}

static size_t parse_value(json *j, int depth) {
    int first = peek(j);
    size_t start = j->at;
    if (depth > MAX_DEPTH)
        refuse("the header is JSON nested deeper than %d", MAX_DEPTH);
    if (first == '"')
        return parse_string(j);
    if (first != '{' && first != '[') {
        /* Numbers, true, false, null, and what Python writes for numbers that are none: NaN, Infinity. */
        while (j->at < j->length && j->text[j->at] && strchr("+-.0123456789EINaefilnrstuy", j->text[j->at]))
            j->at++;
        if (j->at == start)
            refuse("the header is no JSON: no value at its byte %zu", start);
        return new_node(j, LITERAL, j->text + start, j->at - start);
    }
    size_t list = new_node(j, first == '{' ? OBJECT : ARRAY, NULL, 0), last = NONE;
    int close = first == '{' ? '}' : ']', is_key = first == '{';
    j->at++;
    if (peek(j) == close) {
        j->at++;
        return list;
    }
    for (;;) {
        size_t item = is_key ? parse_string(j) : parse_value(j, depth + 1);
        *(last == NONE ? &j->nodes[list].child : &j->nodes[last].next) = item;
        last = item;
        if (!is_key && peek(j) == close) {
            j->at++;
            return list;
        }
        expect(j, is_key ? ':' : ',');
        is_key = first == '{' && !is_key;
    }
}

static json parse(char *text, size_t length) {
    json j = {text, length, 0, NULL, 0, 0};
    parse_value(&j, 0);
    if (peek(&j) != -1)
        refuse("the header is no JSON: more than one value");
    return j;
}

static int is_text(const json *j, size_t at, const char *text) {
    return at != NONE && (j->nodes[at].kind == STRING || j->nodes[at].kind == LITERAL) &&
           j->nodes[at].length == strlen(text) && !memcmp(j->nodes[at].text, text, strlen(text));
}

static size_t member(const json *j, size_t object, const char *name) {
    if (object == NONE || j->nodes[object].kind != OBJECT)
        return NONE;
    for (size_t key = j->nodes[object].child; key != NONE; key = j->nodes[j->nodes[key].next].next)
        if (is_text(j, key, name))
            return j->nodes[key].next;
    return NONE;
}

/* Which of the names, of which the last is NULL, stands here. */
static size_t choice(const json *j, size_t at, const char *const *names, const char *what) {
    for (size_t i = 0; names[i]; i++)
        if (is_text(j, at, names[i]))
            return i;
    refuse("%s is unknown to this reader", what);
    return NONE;
}

static size_t whole(const json *j, size_t at, size_t lowest, size_t most, const char *what) {
    size_t value = 0, length = at != NONE && j->nodes[at].kind == LITERAL ? j->nodes[at].length : 0;
    for (size_t i = 0; i < length; i++) {
        char digit = j->nodes[at].text[i];
        if (digit < '0' || digit > '9' || value > (most - (size_t)(digit - '0')) / 10)
            refuse("%s is no whole number from %zu to %zu", what, lowest, most);
        value = value * 10 + (size_t)(digit - '0');
    }
    if (!length || value < lowest)
        refuse("%s is no whole number from %zu to %zu", what, lowest, most);
    return value;
}

/* The numbers of an array; returns how many. */
static size_t wholes(const json *j, size_t at, size_t *values, size_t room, size_t lowest, size_t most,
                     const char *what) {
    size_t count = 0;
    if (at == NONE || j->nodes[at].kind != ARRAY)
        refuse("%s is no list", what);
    for (size_t item = j->nodes[at].child; item != NONE; item = j->nodes[item].next) {
        if (count == room)
            refuse("%s has more than %zu numbers", what, room);
        values[count++] = whole(j, item, lowest, most, what);
    }
    return count;
}

static void pair(const json *j, size_t at, size_t values[2], const char *what) {
    if (wholes(j, at, values, 2, 1, MAX_VALUES, what) != 2)
        refuse("%s is no pair", what);
}

static void print_json(const json *j, size_t at) {
    const node *value = &j->nodes[at];
    print(stdout, value->text, value->length);
    if (value->kind != OBJECT && value->kind != ARRAY)
        return;
    int is_key = value->kind == OBJECT;
    putchar(is_key ? '{' : '[');
    for (size_t item = value->child; item != NONE; item = j->nodes[item].next) {
        print_json(j, item);
        if (j->nodes[item].next != NONE)
            fputs(is_key ? ": " : ", ", stdout);
        is_key = value->kind == OBJECT && !is_key;
    }
    putchar(value->kind == OBJECT ? '}' : ']');
}

typedef struct {
    json header, metadata;
    size_t packed; /* the node of the metadata that describes the layers */
    const unsigned char *tensors;
    size_t tensor_bytes;
} checkpoint;

enum { U8, F16, BF16, F32 };

typedef struct {
    const unsigned char *data; /* NULL where there is no such tensor */
    size_t type, dims, shape[4], count;
} tensor;

static uint32_t read_bits(const unsigned char *data, int bytes) {
    uint32_t bits = 0;
    for (int i = 0; i < bytes; i++)
        bits |= (uint32_t)data[i] << 8 * i;
    return bits;
}

static checkpoint open_checkpoint(const char *path) {
    checkpoint file;
    size_t size;
    unsigned char *data = read_file(path, &size);
    uint64_t length = size < 8 ? 0 : read_bits(data, 4) | (uint64_t)read_bits(data + 4, 4) << 32;
    if (size < 8 || length > size - 8)
        refuse("%s is no safetensors file, or is cut off", path);
    file.header = parse((char *)data + 8, (size_t)length);
    file.tensors = data + 8 + length;
    file.tensor_bytes = size - 8 - (size_t)length;
    size_t text = member(&file.header, member(&file.header, 0, "__metadata__"), "design_lightning");
    if (text == NONE || file.header.nodes[text].kind != STRING)
        refuse("%s is no file of design-lightning: it has no such metadata", path);
    file.metadata = parse(file.header.nodes[text].text, file.header.nodes[text].length);
    size_t stored = member(&file.metadata, 0, "format_version");
    size_t version = whole(&file.metadata, stored, 0, MAX_VALUES, "format_version");
    if (version != FORMAT_VERSION)
        refuse("%s has format version %zu, but this reader reads %d", path, version, FORMAT_VERSION);
    file.packed = member(&file.metadata, 0, "packed");
    if (file.packed == NONE || file.metadata.nodes[file.packed].kind != OBJECT)
        refuse("%s has no packed layers", path);
    return file;
}

static tensor find_tensor(const checkpoint *file, const char *layer, const char *suffix) {
    static const char *const types[] = {"U8", "F16", "BF16", "F32", NULL};
    static const size_t bytes[] = {1, 2, 2, 4};
    const json *header = &file->header;
    char *name = allocate(NULL, strlen(layer) + strlen(suffix) + 1, 1);
    size_t entry = member(header, 0, strcat(strcpy(name, layer), suffix)), offsets[2];
    tensor found = {NULL, 0, 0, {0, 0, 0, 0}, 1};
    if (entry != NONE) {
        found.type = choice(header, member(header, entry, "dtype"), types, "the dtype of a tensor of the layer");
        found.dims = wholes(header, member(header, entry, "shape"), found.shape, 4, 0, MAX_VALUES, "a tensor's shape");
        for (size_t i = 0; i < found.dims; i++)
            found.count = times(found.count, found.shape[i]);
        if (wholes(header, member(header, entry, "data_offsets"), offsets, 2, 0, SIZE_MAX, "data_offsets") != 2 ||
            offsets[0] > offsets[1] || offsets[1] > file->tensor_bytes ||
            offsets[1] - offsets[0] != found.count * bytes[found.type])
            refuse("%s ends outside the file, which is cut off perhaps, or is not of the size of its shape", name);
        found.data = file->tensors + offsets[0];
    }
    free(name);
    return found;
}

/* A tensor of floats that must be there. */
static tensor find_floats(const checkpoint *file, const char *layer, const char *suffix, size_t dims) {
    tensor found = find_tensor(file, layer, suffix);
    if (!found.data || found.type == U8 || found.dims != dims)
        refuse("%s%s is missing, or is no tensor of floats with %zu dimensions", layer, suffix, dims);
    return found;
}

/* One float per output channel, if there is such a tensor. */
static tensor find_per_output(const checkpoint *file, const char *layer, const char *suffix, size_t outputs) {
    tensor found = find_tensor(file, layer, suffix);
    if (found.data && (found.type == U8 || found.count != outputs))
        refuse("%s%s is not one float per output channel", layer, suffix);
    return found;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float float_at(const tensor *t, size_t i) {
    if (t->type == F32)
        return float_of(read_bits(t->data + 4 * i, 4));
    uint32_t bits = read_bits(t->data + 2 * i, 2), exponent = bits >> 10 & 31;
    if (t->type == BF16)
        return float_of(bits << 16);
    if (exponent == 0)
        return (float)(bits & 1023) / (bits >> 15 ? -16777216.0f : 16777216.0f); /* 2 to the 24th */
    exponent = exponent == 31 ? 255 : exponent + 112;
    return float_of((bits & 0x8000) << 16 | exponent << 23 | (bits & 1023) << 13);
}

enum { CONV2D, LINEAR };
enum { SIGN, RSIGN, DESIGN };
enum { ZERO, PLUS_ONE, MINUS_ONE, REPLICATE, REFLECT, CIRCULAR };

typedef struct {
    size_t kind;
    tensor shift;                     /* rsign: [C] */
    tensor levels, gamma;             /* design: [D, h, w]; [C], or none */
    float factor;                     /* design: unit * scale */
    size_t rows, columns;             /* of the kernel */
    size_t row_phase, column_phase;   /* where the kernel starts */
    size_t prefix_tokens, grid_width; /* a position behind the prefix is row * grid_width + column */
} thresholds;

/* A linear layer is a convolution of 1 x 1 whose channels come last. */
typedef struct {
    size_t kind, outputs, inputs, kernel[2]; /* inputs are those of one group */
    size_t stride[2], dilation[2], groups;
    size_t before[2], after[2], padding; /* top and left, bottom and right; what stands there */
    size_t size[2], out[2];              /* height and width of input and output */
    tensor bits, scale, bias;
    thresholds t;
} layer;

static void read_padding(const json *j, size_t description, layer *l) {
    static const char *const names[] = {"0", "1", "-1", "replicate", "reflect", "circular", NULL};
    size_t at = member(j, description, "padding"), pads[4] = {0, 0, 0, 0};
    int same = is_text(j, at, "same");
    l->padding = choice(j, member(j, description, "padding_value"), names, "the padding_value");
    if (!same && wholes(j, at, pads, 4, 0, MAX_VALUES, "padding") != 4)
        refuse("padding is no list of 4");
    for (int i = 0; i < 2; i++) {
        l->before[i] = pads[i];
        l->after[i] = pads[i + 2];
        if (same) {
            size_t last = (l->size[i] - 1) / l->stride[i] * l->stride[i]; /* where the last window starts */
            size_t end = last + times(l->kernel[i] - 1, l->dilation[i]) + 1;
            size_t total = end > l->size[i] ? end - l->size[i] : 0;
            l->before[i] = total / 2;
            l->after[i] = total - total / 2;
        }
        size_t most = l->before[i] > l->after[i] ? l->before[i] : l->after[i];
        if ((l->padding == REFLECT && most >= l->size[i]) || (l->padding == CIRCULAR && most > l->size[i]))
            refuse("the input is too small for its padding");
    }
}

static size_t phase(size_t size, size_t period, int is_centered) {
    return is_centered ? ((size + period - 1) / period * period - size) / 2 : 0;
}

static void read_design(const checkpoint *file, const char *name, size_t activation, layer *l, int takes_tokens) {
    static const char *const alignments[] = {"topleft", "center", NULL};
    const json *j = &file->metadata;
    size_t channels = l->inputs * l->groups, gamma = member(j, activation, "gamma");
    size_t extent[2] = {l->size[0], l->size[1]};
    int is_centered = choice(j, member(j, activation, "align"), alignments, "the alignment") == 1;
    tensor scale = find_floats(file, name, ".activation.scale", 0);
    tensor unit = find_floats(file, name, ".activation.unit", 0);
    thresholds *t = &l->t;
    t->factor = float_at(&unit, 0) * float_at(&scale, 0);
    t->levels = find_floats(file, name, ".activation.levels", 3);
    if (!t->levels.count || channels % t->levels.shape[0])
        refuse("%s has a kernel whose depth does not divide its channels", name);
    if (gamma != NONE && j->nodes[gamma].kind == STRING) {
        char *key = allocate(NULL, j->nodes[gamma].length + 1, 1);
        memcpy(key, j->nodes[gamma].text, j->nodes[gamma].length);
        key[j->nodes[gamma].length] = '\0';
        t->gamma = find_floats(file, key, "", 1);
        if (t->gamma.count != channels)
            refuse("%s has not one gamma per channel", name);
        free(key);
    } else if (!is_text(j, gamma, "null"))
        refuse("gamma is neither the name of a tensor nor null");
    t->rows = t->levels.shape[1];
    t->columns = t->levels.shape[2];
    if (takes_tokens && is_text(j, member(j, activation, "grid"), "null")) {
        t->columns *= t->rows; /* the kernel read row by row, along the tokens */
        t->rows = 1;
    } else if (takes_tokens) {
        pair(j, member(j, activation, "grid"), extent, "grid");
        t->prefix_tokens = whole(j, member(j, activation, "prefix_tokens"), 0, MAX_VALUES, "prefix_tokens");
        if (t->prefix_tokens + times(extent[0], extent[1]) != l->size[1])
            refuse("%s takes %zu tokens and a grid of %zu x %zu", name, t->prefix_tokens, extent[0], extent[1]);
    }
    t->grid_width = extent[1];
    t->row_phase = phase(extent[0], t->rows, is_centered);
    t->column_phase = phase(extent[1], t->columns, is_centered);
}

static layer read_layer(const checkpoint *file, const char *name, size_t height, size_t width) {
    static const char *const kinds[] = {"conv2d", "linear", NULL};
    static const char *const activations[] = {"sign", "rsign", "design", NULL};
    const json *j = &file->metadata;
    size_t description = member(j, file->packed, name), shape[4] = {0, 0, 1, 1};
    layer l = {.groups = 1, .stride = {1, 1}, .dilation = {1, 1}};
    if (description == NONE)
        refuse("there is no packed layer of this name: %s", name);
    l.kind = choice(j, member(j, description, "kind"), kinds, "the kind of the layer");
    if (!width || (l.kind == CONV2D && !height))
        refuse("%s takes no input of %zu x %zu", name, height, width);
    size_t dims = wholes(j, member(j, description, "shape"), shape, 4, 1, MAX_VALUES, "shape");
    if (dims != (l.kind == CONV2D ? 4 : 2))
        refuse("%s has a shape of %zu dimensions", name, dims);
    l.outputs = shape[0];
    l.inputs = shape[1];
    memcpy(l.kernel, shape + 2, sizeof l.kernel);
    l.size[0] = height ? height : 1;
    l.size[1] = width;
    if (l.kind == CONV2D) {
        pair(j, member(j, description, "stride"), l.stride, "stride");
        pair(j, member(j, description, "dilation"), l.dilation, "dilation");
        l.groups = whole(j, member(j, description, "groups"), 1, MAX_VALUES, "groups");
        read_padding(j, description, &l);
    }
    for (int i = 0; i < 2; i++) {
        size_t padded = l.size[i] + l.before[i] + l.after[i], reach = times(l.kernel[i] - 1, l.dilation[i]) + 1;
        if (padded < reach)
            refuse("the input is smaller than the kernel of %s", name);
        l.out[i] = (padded - reach) / l.stride[i] + 1;
    }
    size_t fan_in = times(times(l.inputs, l.kernel[0]), l.kernel[1]), channels = times(l.inputs, l.groups);
    if (l.outputs % l.groups)
        refuse("%s has a number of outputs that its groups do not divide", name);
    l.bits = find_tensor(file, name, ".bits");
    if (!l.bits.data || l.bits.type != U8 || l.bits.count != times(l.outputs, (fan_in + 7) / 8))
        refuse("%s.bits is missing, or not of the size that shape says", name);
    l.scale = find_per_output(file, name, ".scale", l.outputs);
    l.bias = find_per_output(file, name, ".bias", l.outputs);
    size_t activation = member(j, description, "activation");
    if (is_text(j, activation, "null"))
        refuse("%s has no activation, and this reader multiplies bits alone", name);
    l.t.kind = choice(j, member(j, activation, "kind"), activations, "the activation of the layer");
    if (l.t.kind == DESIGN)
        read_design(file, name, activation, &l, !height);
    if (l.t.kind == RSIGN) {
        l.t.shift = find_floats(file, name, ".activation.shift", 1);
        if (l.t.shift.count != channels)
            refuse("%s has not one shift per channel", name);
    }
    return l;
}

static float threshold(const thresholds *t, size_t channel, size_t position) {
    if (t->kind == SIGN || position < t->prefix_tokens)
        return 0;
    if (t->kind == RSIGN)
        return float_at(&t->shift, channel);
    position -= t->prefix_tokens;
    size_t row = (position / t->grid_width + t->row_phase) % t->rows;
    size_t column = (position % t->grid_width + t->column_phase) % t->columns;
    size_t depth = channel % t->levels.shape[0];
    float factor = t->factor; /* rounded to float32 after each product, as in the library */
    if (t->gamma.data)
        factor *= float_at(&t->gamma, channel);
    return factor * float_at(&t->levels, (depth * t->rows + row) * t->columns + column);
}

/* One bit a value, 1 for +1; each position has its channels in words of 64. */
static uint64_t *binarize(const layer *l, const unsigned char *input) {
    size_t channels = l->inputs * l->groups, words = (channels + 63) / 64, positions = l->size[0] * l->size[1];
    uint64_t *signs = allocate(NULL, times(positions, words), sizeof *signs);
    memset(signs, 0, positions * words * sizeof *signs);
    for (size_t position = 0; position < positions; position++)
        for (size_t channel = 0; channel < channels; channel++) {
            size_t at = l->kind == CONV2D ? channel * positions + position : position * channels + channel;
            float limit = threshold(&l->t, channel, position);
            if (float_of(read_bits(input + 4 * at, 4)) >= limit)
                signs[position * words + channel / 64] |= (uint64_t)1 << channel % 64;
        }
    return signs;
}

static int popcount(uint64_t word) {
    word -= word >> 1 & UINT64_C(0x5555555555555555);
    word = (word & UINT64_C(0x3333333333333333)) + (word >> 2 & UINT64_C(0x3333333333333333));
    word = (word + (word >> 4)) & UINT64_C(0x0F0F0F0F0F0F0F0F);
    return (int)(word * UINT64_C(0x0101010101010101) >> 56);
}

/* Where a coordinate of the padded input is read, or NONE where a constant stands. */
static size_t source(size_t padded, size_t before, size_t size, size_t padding) {
    if (padded >= before && padded - before < size)
        return padded - before;
    if (padding == REPLICATE)
        return padded < before ? 0 : size - 1;
    if (padding == REFLECT)
        return padded < before ? before - padded : 2 * size - 2 - (padded - before);
    if (padding == CIRCULAR)
        return padded < before ? padded + size - before : padded - before - size;
    return NONE;
}

/* The bits under the kernel at one place, in the order of the weights; `valid` has a 1 for each that counts. */
static void gather(const layer *l, const uint64_t *signs, size_t group, const size_t place[2], uint64_t *patch,
                   uint64_t *valid) {
    size_t words = (l->inputs * l->groups + 63) / 64, bit = 0, tap[2], at[2];
    for (tap[0] = 0; tap[0] < l->kernel[0]; tap[0]++)
        for (tap[1] = 0; tap[1] < l->kernel[1]; tap[1]++) {
            for (int i = 0; i < 2; i++)
                at[i] = source(place[i] * l->stride[i] + tap[i] * l->dilation[i], l->before[i], l->size[i], l->padding);
            int is_inside = at[0] != NONE && at[1] != NONE;
            const uint64_t *pixel = is_inside ? signs + (at[0] * l->size[1] + at[1]) * words : NULL;
            if (!is_inside && l->padding == ZERO) {
                bit += l->inputs; /* zeros of `valid`: these count neither for nor against */
                continue;
            }
            for (size_t c = group * l->inputs; c < (group + 1) * l->inputs; c++, bit++) {
                uint64_t sign = pixel ? pixel[c / 64] >> c % 64 & 1 : l->padding == PLUS_ONE;
                patch[bit / 64] |= sign << bit % 64;
                valid[bit / 64] |= (uint64_t)1 << bit % 64;
            }
        }
}

static void multiply(const layer *l, const uint64_t *signs, float *output) {
    size_t fan_in = l->inputs * l->kernel[0] * l->kernel[1], words = (fan_in + 63) / 64, row_bytes = (fan_in + 7) / 8;
    size_t positions = l->out[0] * l->out[1], per_group = l->outputs / l->groups, place[2];
    uint64_t *weights = allocate(NULL, times(l->outputs, words), sizeof *weights);
    uint64_t *patch = allocate(NULL, words, sizeof *patch), *valid = allocate(NULL, words, sizeof *valid);
    memset(weights, 0, l->outputs * words * sizeof *weights);
    for (size_t o = 0; o < l->outputs; o++)
        for (size_t i = 0; i < row_bytes; i++)
            weights[o * words + i / 8] |= (uint64_t)l->bits.data[o * row_bytes + i] << 8 * (i % 8);
    for (place[0] = 0; place[0] < l->out[0]; place[0]++)
        for (place[1] = 0; place[1] < l->out[1]; place[1]++)
            for (size_t group = 0; group < l->groups; group++) {
                size_t position = place[0] * l->out[1] + place[1];
                memset(patch, 0, words * sizeof *patch);
                memset(valid, 0, words * sizeof *valid);
                gather(l, signs, group, place, patch, valid);
                for (size_t o = group * per_group; o < (group + 1) * per_group; o++) {
                    int64_t sum = 0;
                    for (size_t i = 0; i < words; i++)
                        sum += 2 * popcount(~(patch[i] ^ weights[o * words + i]) & valid[i]) - popcount(valid[i]);
                    float y = (float)sum;
                    if (l->scale.data)
                        y *= float_at(&l->scale, o);
                    if (l->bias.data)
                        y += float_at(&l->bias, o);
                    output[l->kind == CONV2D ? o * positions + position : position * l->outputs + o] = y;
                }
            }
    free(weights);
    free(patch);
    free(valid);
}

static void list(const checkpoint *file) {
    const json *j = &file->metadata;
    for (size_t key = j->nodes[file->packed].child; key != NONE; key = j->nodes[j->nodes[key].next].next) {
        print_json(j, key);
        putchar(' ');
        print_json(j, j->nodes[key].next);
        putchar('\n');
    }
}

static void run(const checkpoint *file, const char *name, const char *in, size_t height, size_t width,
                const char *out) {
    layer l = read_layer(file, name, height, width);
    size_t wanted = times(times(times(l.inputs, l.groups), l.size[0]), l.size[1]) * 4, size;
    size_t values = times(times(l.outputs, l.out[0]), l.out[1]);
    unsigned char *input = read_file(in, &size);
    if (size != wanted)
        refuse("%s has %zu bytes, but %s takes %zu", in, size, name, wanted);
    uint64_t *signs = binarize(&l, input);
    float *output = allocate(NULL, values, sizeof *output);
    multiply(&l, signs, output);
    FILE *to = fopen(out, "wb");
    if (!to)
        refuse("%s cannot be written", out);
    for (size_t i = 0; i < values; i++) {
        uint32_t bits;
        memcpy(&bits, &output[i], sizeof bits);
        for (int shift = 0; shift < 32; shift += 8)
            putc((int)(bits >> shift & 255), to);
    }
    int failed = ferror(to);
    if (fclose(to) || failed)
        refuse("%s cannot be written", out);
    free(input);
    free(signs);
    free(output);
}

static size_t argument(char *text) {
    node number = {LITERAL, text, strlen(text), NONE, NONE};
    json j = {text, number.length, 0, &number, 1, 1};
    return whole(&j, 0, 0, MAX_VALUES, "H or W");
}

int main(int argc, char **argv) {
    if (argc != 2 && argc != 7) {
        fputs("usage: reader FILE | reader FILE LAYER IN.bin H W OUT.bin\n", stderr);
        return 1;
    }
    checkpoint file = open_checkpoint(argv[1]);
    if (argc == 2)
        list(&file);
    else
        run(&file, argv[2], argv[3], argument(argv[4]), argument(argv[5]), argv[6]);
    free(file.header.nodes);
    free(file.metadata.nodes);
    free((unsigned char *)file.header.text - 8);
    return 0;
}
