// A plugin of qemu's user-mode emulators: how often every translated block ran.
//
// At the end it writes a line "address instructions runs" for each block to the file $COUNT_OUT. The
// few functions of the plugin interface (version 1) that it uses are declared here, so that it builds
// without qemu's sources.
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef uint64_t Id;
struct qemu_plugin_tb;
void qemu_plugin_register_vcpu_tb_trans_cb(Id, void (*)(Id, struct qemu_plugin_tb *));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
void qemu_plugin_register_atexit_cb(Id, void (*)(Id, void *), void *);

int qemu_plugin_version = 1;

struct Block {
  uint64_t address, instructions, runs;
  struct Block *next;
};
static struct Block *blocks;

static void translated(Id id, struct qemu_plugin_tb *tb) {
  (void)id;
  struct Block *block = calloc(1, sizeof *block);
  block->address = qemu_plugin_tb_vaddr(tb);
  block->instructions = qemu_plugin_tb_n_insns(tb);
  block->next = blocks;
  blocks = block;
  const int add_u64 = 0;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, add_u64, &block->runs, 1);
}

static void finished(Id id, void *unused) {
  (void)id, (void)unused;
  FILE *out = fopen(getenv("COUNT_OUT"), "w");
  for (struct Block *block = blocks; block; block = block->next)
    if (block->runs)
      fprintf(out, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions,
              block->runs);
  fclose(out);
}

int qemu_plugin_install(Id id, const void *info, int count, char **words) {
  (void)info, (void)count, (void)words;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, finished, 0);
  return 0;
}
