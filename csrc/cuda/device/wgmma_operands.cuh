// Operand lists for inline assembly, which cannot be made by templates: 4 to 128 accumulators d.
// FASTST_TEXT_R is their place holders, %0 to %(R-1); FASTST_D_R the operands.
#pragma once

#define FASTST_TEXT_4 "%0, %1, %2, %3"
#define FASTST_D_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTST_TEXT_8 FASTST_TEXT_4 ", %4, %5, %6, %7"
#define FASTST_D_8 FASTST_D_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTST_TEXT_12 FASTST_TEXT_8 ", %8, %9, %10, %11"
#define FASTST_D_12 FASTST_D_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FASTST_TEXT_16 FASTST_TEXT_12 ", %12, %13, %14, %15"
#define FASTST_D_16 FASTST_D_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTST_TEXT_20 FASTST_TEXT_16 ", %16, %17, %18, %19"
#define FASTST_D_20 FASTST_D_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FASTST_TEXT_24 FASTST_TEXT_20 ", %20, %21, %22, %23"
#define FASTST_D_24 FASTST_D_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTST_TEXT_28 FASTST_TEXT_24 ", %24, %25, %26, %27"
#define FASTST_D_28 FASTST_D_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FASTST_TEXT_32 FASTST_TEXT_28 ", %28, %29, %30, %31"
#define FASTST_D_32 FASTST_D_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTST_TEXT_36 FASTST_TEXT_32 ", %32, %33, %34, %35"
#define FASTST_D_36 FASTST_D_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FASTST_TEXT_40 FASTST_TEXT_36 ", %36, %37, %38, %39"
#define FASTST_D_40 FASTST_D_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTST_TEXT_44 FASTST_TEXT_40 ", %40, %41, %42, %43"
#define FASTST_D_44 FASTST_D_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FASTST_TEXT_48 FASTST_TEXT_44 ", %44, %45, %46, %47"
#define FASTST_D_48 FASTST_D_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTST_TEXT_52 FASTST_TEXT_48 ", %48, %49, %50, %51"
#define FASTST_D_52 FASTST_D_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FASTST_TEXT_56 FASTST_TEXT_52 ", %52, %53, %54, %55"
#define FASTST_D_56 FASTST_D_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTST_TEXT_60 FASTST_TEXT_56 ", %56, %57, %58, %59"
#define FASTST_D_60 FASTST_D_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FASTST_TEXT_64 FASTST_TEXT_60 ", %60, %61, %62, %63"
#define FASTST_D_64 FASTST_D_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTST_TEXT_68 FASTST_TEXT_64 ", %64, %65, %66, %67"
#define FASTST_D_68 FASTST_D_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FASTST_TEXT_72 FASTST_TEXT_68 ", %68, %69, %70, %71"
#define FASTST_D_72 FASTST_D_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTST_TEXT_76 FASTST_TEXT_72 ", %72, %73, %74, %75"
#define FASTST_D_76 FASTST_D_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FASTST_TEXT_80 FASTST_TEXT_76 ", %76, %77, %78, %79"
#define FASTST_D_80 FASTST_D_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTST_TEXT_84 FASTST_TEXT_80 ", %80, %81, %82, %83"
#define FASTST_D_84 FASTST_D_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FASTST_TEXT_88 FASTST_TEXT_84 ", %84, %85, %86, %87"
#define FASTST_D_88 FASTST_D_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTST_TEXT_92 FASTST_TEXT_88 ", %88, %89, %90, %91"
#define FASTST_D_92 FASTST_D_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FASTST_TEXT_96 FASTST_TEXT_92 ", %92, %93, %94, %95"
#define FASTST_D_96 FASTST_D_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTST_TEXT_100 FASTST_TEXT_96 ", %96, %97, %98, %99"
#define FASTST_D_100 FASTST_D_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FASTST_TEXT_104 FASTST_TEXT_100 ", %100, %101, %102, %103"
#define FASTST_D_104 FASTST_D_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTST_TEXT_108 FASTST_TEXT_104 ", %104, %105, %106, %107"
#define FASTST_D_108 FASTST_D_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FASTST_TEXT_112 FASTST_TEXT_108 ", %108, %109, %110, %111"
#define FASTST_D_112 FASTST_D_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTST_TEXT_116 FASTST_TEXT_112 ", %112, %113, %114, %115"
#define FASTST_D_116 FASTST_D_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FASTST_TEXT_120 FASTST_TEXT_116 ", %116, %117, %118, %119"
#define FASTST_D_120 FASTST_D_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTST_TEXT_124 FASTST_TEXT_120 ", %120, %121, %122, %123"
#define FASTST_D_124 FASTST_D_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FASTST_TEXT_128 FASTST_TEXT_124 ", %124, %125, %126, %127"
#define FASTST_D_128 FASTST_D_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// F(N, number of accumulators, numbers of the seven operands that follow them) for every N.
#define FASTST_EVERY_N(F)                        \
  F(8, 4, 4, 5, 6, 7, 8, 9, 10)                  \
  F(16, 8, 8, 9, 10, 11, 12, 13, 14)             \
  F(24, 12, 12, 13, 14, 15, 16, 17, 18)          \
  F(32, 16, 16, 17, 18, 19, 20, 21, 22)          \
  F(40, 20, 20, 21, 22, 23, 24, 25, 26)          \
  F(48, 24, 24, 25, 26, 27, 28, 29, 30)          \
  F(56, 28, 28, 29, 30, 31, 32, 33, 34)          \
  F(64, 32, 32, 33, 34, 35, 36, 37, 38)          \
  F(72, 36, 36, 37, 38, 39, 40, 41, 42)          \
  F(80, 40, 40, 41, 42, 43, 44, 45, 46)          \
  F(88, 44, 44, 45, 46, 47, 48, 49, 50)          \
  F(96, 48, 48, 49, 50, 51, 52, 53, 54)          \
  F(104, 52, 52, 53, 54, 55, 56, 57, 58)         \
  F(112, 56, 56, 57, 58, 59, 60, 61, 62)         \
  F(120, 60, 60, 61, 62, 63, 64, 65, 66)         \
  F(128, 64, 64, 65, 66, 67, 68, 69, 70)         \
  F(136, 68, 68, 69, 70, 71, 72, 73, 74)         \
  F(144, 72, 72, 73, 74, 75, 76, 77, 78)         \
  F(152, 76, 76, 77, 78, 79, 80, 81, 82)         \
  F(160, 80, 80, 81, 82, 83, 84, 85, 86)         \
  F(168, 84, 84, 85, 86, 87, 88, 89, 90)         \
  F(176, 88, 88, 89, 90, 91, 92, 93, 94)         \
  F(184, 92, 92, 93, 94, 95, 96, 97, 98)         \
  F(192, 96, 96, 97, 98, 99, 100, 101, 102)      \
  F(200, 100, 100, 101, 102, 103, 104, 105, 106) \
  F(208, 104, 104, 105, 106, 107, 108, 109, 110) \
  F(216, 108, 108, 109, 110, 111, 112, 113, 114) \
  F(224, 112, 112, 113, 114, 115, 116, 117, 118) \
  F(232, 116, 116, 117, 118, 119, 120, 121, 122) \
  F(240, 120, 120, 121, 122, 123, 124, 125, 126) \
  F(248, 124, 124, 125, 126, 127, 128, 129, 130) \
  F(256, 128, 128, 129, 130, 131, 132, 133, 134)
