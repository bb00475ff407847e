/* adamw_pages.h: one AdamW step on state that lies in pages of a file: kernels/adamw_pages.py. Included by kernels.c.

   A lane brings a page, works on it and takes it away while its processor has it in its cache, and waits for no other.
   All lanes are in one call: with threads of Python's as lanes a step took half as long again (docs/paging.md). */

#include <errno.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* A run of n elements of one parameter. at: bytes into its page, of exp_avg and exp_avg_sq or, with `eight`, of the
   codes and absmax of each. */
typedef struct {
    void *p;
    const void *g;
    int64_t n, at[4];
    int p_dtype, g_dtype, eight;
    adamw_step step;
} page_span;

enum { IS_THERE, IS_NEW, IS_READ };
enum { NOT_BEGUN, BEGUN, WORKED, GONE };

/* frame: NULL for the lane's own, and then where it was. place: bytes into the file. stage, seconds: what came of it, and
   how long it took to move. */
typedef struct {
    char *frame;
    const page_span *spans;
    int64_t n_spans, used, place;
    int comes, goes, stage;
    double seconds;
} page_visit;

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Returns 0, or errno. */
static int transfer(int file, char *data, int64_t bytes, int64_t place, int out) {
    while (bytes) {
        ssize_t moved = out ? pwrite(file, data, (size_t)bytes, place) : pread(file, data, (size_t)bytes, place);
        if (moved < 0 && errno == EINTR) continue;
        if (moved <= 0) return moved ? errno : EIO;
        data += moved, place += moved, bytes -= moved;
    }
    return 0;
}

static int visit(page_visit *v, int file, const map_8bit *map1, const map_8bit *map2) {
    double start = seconds_now();
    int error = 0;
    v->stage = BEGUN;
    if (v->comes == IS_NEW) memset(v->frame, 0, (size_t)v->used);
    if (v->comes == IS_READ) error = transfer(file, v->frame, v->used, v->place, 0);
    v->seconds = seconds_now() - start;
    if (error) return error;
    for (const page_span *s = v->spans; s < v->spans + v->n_spans; s++) {
        char *state[4];
        for (int i = 0; i < 4; i++) state[i] = v->frame + s->at[i];
        if (s->eight)
            FOR_ISA(adamw_8bit)(s->p, s->p_dtype, s->g, s->g_dtype, (uint8_t *)state[0], (float *)state[1],
                                (uint8_t *)state[2], (float *)state[3], map1, map2, s->n, &s->step, 1);
        else
            FOR_ISA(adamw)(s->p, s->p_dtype, s->g, s->g_dtype, (float *)state[0], (float *)state[1], s->n, &s->step, 1);
    }
    v->stage = WORKED;
    if (!v->goes) return 0;
    start = seconds_now();
    error = transfer(file, v->frame, v->used, v->place, 1);
    v->seconds += seconds_now() - start;
    if (!error) v->stage = GONE;
    return error;
}

/* frames: one for each lane. map1, map2: for 8-bit spans, if there are any. Returns 0, or errno of the transfer that
   failed: then no further page is begun. */
int FOR_ISA(adamw_pages)(page_visit *visits, int64_t n, int file, char *const *frames, int lanes,
                         const map_8bit *map1, const map_8bit *map2) {
    int error = 0;
#pragma omp parallel for num_threads(lanes) schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) {
        int before, lane = 0;
#ifdef _OPENMP
        lane = omp_get_thread_num();
#endif
#pragma omp atomic read
        before = error;
        if (before) continue;
        if (!visits[i].frame) visits[i].frame = frames[lane];
        int mine = visit(&visits[i], file, map1, map2);
        if (mine) {
#pragma omp atomic write
            error = mine;
        }
    }
    return error;
}
